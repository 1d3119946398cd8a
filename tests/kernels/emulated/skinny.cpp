// The entry that tests call: a launch of skinny.

extern "C" void launch(int grid, int seed, const Launch* arguments) {
    Launch l = *arguments;
    run_grid(grid, PHASES > 1 ? grid : 1, THREADS, seed, [=] { skinny(l); });  // blocks of two phases run at once
}
