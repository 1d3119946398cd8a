// Of the kernels for few tokens: the sums of four rows in memory, of which there may be fewer.

__device__ inline void store_floats(float* to, float4 y, int rows, bool aligned) {
    if (aligned) {
        *(float4*)to = y;
        return;
    }
    if (rows > 0) to[0] = y.x;
    if (rows > 1) to[1] = y.y;
    if (rows > 2) to[2] = y.z;
    if (rows > 3) to[3] = y.w;
}

__device__ inline void store_bfloat16(unsigned short* to, float4 y, int rows, bool aligned) {
    unsigned short h[4] = {to_bfloat16(y.x), to_bfloat16(y.y), to_bfloat16(y.z), to_bfloat16(y.w)};
    if (aligned) {
        *(uint2*)to = {h[0] | (u32)h[1] << 16, h[2] | (u32)h[3] << 16};
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < rows) to[i] = h[i];
}
