// The entry that tests call: a launch of tile4.

extern "C" void launch(int grid, int cluster, int seed, const TensorMap* x_map, const Problem* problem) {
    run_grid(grid, cluster, THREADS, seed, [=] { tile4(*x_map, *problem); });
}
