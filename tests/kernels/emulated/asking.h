// What asking.cu needs beside cuda.h. The host's memory is the device's.

#define blockDim (Index{(int)(32 * current->block->warps.size())})

static bool __syncthreads_or(bool any) {
    static bool found;
    __syncthreads();
    if (threadIdx.x == 0) found = false;
    __syncthreads();
    found |= any;
    __syncthreads();
    return found;
}

static void __threadfence_system() {}
static float4 __ldcv(const float4* p) { return *p; }
static void store_for_host(int* place, int value) { *place = value, moved = true; }
static int load_from_host(const int* place) { return *place; }
