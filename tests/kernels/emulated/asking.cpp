// The entries that tests call: launches of ask and of receive.

extern "C" void launch_ask(int threads, int seed, const Question* question) {
    Question q = *question;
    run_grid(1, 1, threads, seed, [=] { ask(q); });
}

extern "C" void launch_receive(int grid, int threads, int seed, const int* turn, const int* answered,
                               const float4* answer, float4* out, int vectors) {
    run_grid(grid, 1, threads, seed, [=] { receive(turn, answered, answer, out, vectors); });
}
