"""Which layers and experts go where: decided before anything is allocated, by arithmetic alone."""
