// A table in shared memory with an entry for each byte of codes, its two levels, once for every lane. Entries are
// TABLE_STRIDE bytes apart: 256, so that a byte is the second of its entry's address, which saves an instruction of two,
// or 128, which takes half of the room.

// How far into the table the lane's levels of byte `i` of a word are; `own` is the lane's place in an entry, and its bits
// from the 16th on are kept.
__device__ __forceinline__ u32 entry_of(u32 word, int i, u32 own) {
    if (TABLE_STRIDE == 256) return __byte_perm(word, own, 0x7604 + 16 * i);
    return (i ? word >> (8 * i - 7) : word << 7) & 0x7f80 | own;
}
