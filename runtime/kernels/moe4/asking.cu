// A layer asks the host for what it computes of the layer's experts, and waits for that.
//
// Both work on places in the host's memory. A turn is a number that grows from question to question, so that an answer
// to an earlier one is none.

struct Question {
    const int* ids;        // [pairs], of experts
    const float* weights;  // [pairs], the router's
    const uint4* y;        // bfloat16, the tokens
    const u8* able;        // [experts], 1 for those of which the host has its part
    int* units;            // [pairs], hidden units left to the GPU
    int* turn;             // [2], that of the last question, and whether it asked for anything
    // In the host's memory:
    int* host_ids;
    int* host_units;
    float* host_weights;
    uint4* host_y;
    int* posted;  // twice the turn, and one more if something is asked for
    int pairs, vectors, whole, left;  // vectors of y; units of an expert, and of one that is divided
};

// One block. An expert that several tokens chose is left whole.
extern "C" __global__ void ask(const Question q) {
    wait_for_previous_kernel();
    bool any = false;
    for (int p = threadIdx.x; p < q.pairs; p += blockDim.x) {
        int expert = q.ids[p], tokens = 0;
        for (int i = 0; i < q.pairs; ++i) tokens += q.ids[i] == expert;
        bool divided = tokens == 1 && q.able[expert];
        q.units[p] = q.host_units[p] = divided ? q.left : q.whole;
        q.host_ids[p] = expert;
        q.host_weights[p] = q.weights[p];
        any |= divided;
    }
    any = __syncthreads_or(any);
    if (any)
        for (int i = threadIdx.x; i < q.vectors; i += blockDim.x) q.host_y[i] = q.y[i];
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) {
        q.turn[0] += 1;
        q.turn[1] = any;
        store_for_host(q.posted, 2 * q.turn[0] + any);
    }
}

// `out` becomes what the host answers, or 0 if it was not asked. A negative turn is no answer but ends the waiting.
extern "C" __global__ void receive(const int* turn, const int* answered, const float4* answer, float4* out, int vectors) {
    wait_for_previous_kernel();
    bool asked = turn[1];
    if (asked && threadIdx.x == 0)
        for (int seen = 0; seen >= 0 && seen != turn[0];) seen = load_from_host(answered);
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += gridDim.x * blockDim.x)
        out[i] = asked ? __ldcv(answer + i) : float4{};
}
