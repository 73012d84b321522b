// Open-addressing hash table with exact keys. A point's record holds the coordinates of its
// remainder-0 vertex and its ranks, from which the keys of its d+1 vertices are computed. A slot
// holds a 32-bit fingerprint and an entry (point, vertex) with the key. When fingerprints match,
// the keys are compared, so keys of any range are never confused.
#pragma once

#include "common/atomics.h"
#include "common/status.h"
#include "permutohedral/dispatch.h"
#include "permutohedral/lattice.h"

namespace segkernels {

struct KeyTable {
  unsigned long long* slots;  // all ones: empty
  uint32_t capacity;
  const int32_t* records;  // [positions, record_size(dims)]
  int32_t image_positions;
};

inline namespace SK_NS {

constexpr Word kEmpty = ~Word(0);
constexpr int kRanksPerWord = 6;  // 5 bits each

SK_HD constexpr int record_size(int dims) {
  return dims + (dims + kRanksPerWord - 1) / kRanksPerWord;
}

// The last word of a record is negative if the position has no valid point.
template <int D>
SK_HD bool record_valid(Dims<D> n, const int32_t* record) {
  return record[record_size(n) - 1] >= 0;
}

template <int D>
struct Key {
  int32_t coordinate[Dims<D>::kMost];  // the last coordinate is minus their sum
};

template <int D>
SK_HD Key<D> key_of(Dims<D> n, const int32_t* record, int k) {
  Key<D> key;
#pragma unroll(Dims<D>::kUnroll)
  for (int i = 0; i < n; ++i) {
    const int32_t rank = record[n + i / kRanksPerWord] >> (5 * (i % kRanksPerWord)) & 31;
    key.coordinate[i] = record[i] + k - (rank > n - k ? n + 1 : 0);
  }
  return key;
}

template <int D>
SK_HD Word hash_of(Dims<D> n, const Key<D>& key, int32_t image) {
  Word h = Word(uint32_t(image)) + 0x9E3779B97F4A7C15ull;
#pragma unroll(Dims<D>::kUnroll)
  for (int i = 0; i < n; ++i) {
    h = (h ^ Word(uint32_t(key.coordinate[i]))) * 0xD6E8FEB86659FD93ull;
    h ^= h >> 32;
  }
  h *= 0xD6E8FEB86659FD93ull;
  return h ^ h >> 32;
}

template <int D>
SK_HD bool entry_has_key(Dims<D> n, const KeyTable& t, uint32_t entry, const Key<D>& key,
                         int32_t image) {
  const uint32_t position = entry / (n + 1);
  if (int32_t(position / uint32_t(t.image_positions)) != image) return false;
  const Key<D> other =
      key_of(n, t.records + int64_t(position) * record_size(n), int(entry - position * (n + 1)));
  bool same = true;
#pragma unroll(Dims<D>::kUnroll)
  for (int i = 0; i < n; ++i) same = same && other.coordinate[i] == key.coordinate[i];
  return same;
}

SK_HD uint32_t first_slot(const KeyTable& t, Word hash) {
  return uint32_t((hash & 0xFFFFFFFFull) * t.capacity >> 32);
}

// The slot of a key, or kNoSlot.
template <int D>
SK_HD uint32_t find_key(Dims<D> n, const KeyTable& t, const Key<D>& key, int32_t image) {
  const Word hash = hash_of(n, key, image);
  uint32_t slot = first_slot(t, hash);
  for (;;) {
    const Word seen = atomic_read(t.slots + slot);
    if (seen == kEmpty) return kNoSlot;
    if (seen >> 32 == hash >> 32 && entry_has_key(n, t, uint32_t(seen), key, image)) return slot;
    slot = slot + 1 == t.capacity ? 0 : slot + 1;
  }
}

// Inserts an entry's key into the table, which is never full; returns its slot. In the end each
// slot holds the least entry with its key, in any order of insertion.
template <int D>
SK_HD uint32_t insert_key(Dims<D> n, const KeyTable& t, uint32_t entry, const Key<D>& key,
                          int32_t image) {
  const Word hash = hash_of(n, key, image);
  const Word mine = (hash & 0xFFFFFFFF00000000ull) | entry;
  uint32_t slot = first_slot(t, hash);
  for (;;) {
    Word seen = atomic_read(t.slots + slot);
    if (seen == kEmpty) seen = atomic_cas(t.slots + slot, kEmpty, mine);
    if (seen == kEmpty) return slot;
    if (seen >> 32 == hash >> 32 && entry_has_key(n, t, uint32_t(seen), key, image)) {
      if (mine < seen) atomic_min(t.slots + slot, mine);
      return slot;
    }
    slot = slot + 1 == t.capacity ? 0 : slot + 1;
  }
}

}  // namespace SK_NS
}  // namespace segkernels
