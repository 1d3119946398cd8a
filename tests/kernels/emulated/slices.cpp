// The entry that tests call: a launch of slices.

extern "C" void launch(int grid, int seed, const Args* arguments) {
    Args a = *arguments;
    run_grid(grid, 1, THREADS, seed, [=] { slices(a); });
}
