// many.cuh: one launch over many arrays: which part of which array a block has.
//
// A model's parameters are hundreds of arrays, most of them small: a launch for each would leave the GPU waiting for the host.
// Here block i has the next CHUNK elements of array owner[i], whose row of the table names its size, its first block and, as the
// kernel says, numbers and addresses. The rows come behind FACTS numbers that are the same for all arrays.
//
// Compile-time: VECTOR, elements moved by one instruction; all arrays begin aligned for that. FACTS, ROW: numbers in the table.
#pragma once
#include "common.cuh"

constexpr int THREADS = 256, ITEMS = 4, CHUNK = THREADS * ITEMS * VECTOR;

struct Part {
    const long long* row;                                              // after size and first block
    long long begin, size;

    DEVICE Part(const long long* owner, const long long* table, long long block) {
        row = table + FACTS + owner[block] * ROW;
        size = row[0];
        begin = (block - row[1]) * CHUNK;
        row += 2;
    }
    // Where this thread's pack number `item` begins, and how many elements of it there are.
    DEVICE long long at(int item) const { return begin + (item * THREADS + (int)threadIdx.x) * VECTOR; }
    DEVICE int valid(int item) const { return size - at(item) > VECTOR ? VECTOR : (int)(size - at(item)); }
    template <typename T> DEVICE T* array(int column) const { return reinterpret_cast<T*>(row[column]); }
};
