// Loads and stores of fewer lanes, for ISAs without masks: through a full-sized copy on the stack.
// Included inside the ISA's namespace.

template <class T>
QK_INLINE F32 load(const T* p, Part n) {
  T copy[kLanes] = {};
  std::memcpy(copy, p, n.count * sizeof(T));
  return load(copy, Full{});
}
template <class T>
QK_INLINE void store(T* p, F32 x, Part n) {
  T copy[kLanes];
  store(copy, x, Full{});
  std::memcpy(p, copy, n.count * sizeof(T));
}
QK_INLINE I32 load_signed(const void* p, Part n) {
  int8_t copy[kLanes] = {};
  std::memcpy(copy, p, n.count);
  return load_signed(copy, Full{});
}
QK_INLINE void store_bytes(void* p, I32 x, Part n) {
  int8_t copy[kLanes];
  store_bytes(copy, x, Full{});
  std::memcpy(p, copy, n.count);
}
// The lanes that a load of n lanes fills; the others become zero.
QK_INLINE F32 keep(F32 x, Full) { return x; }
QK_INLINE F32 keep(F32 x, Part n) {
  float copy[kLanes];
  store(copy, x, Full{});
  return load(copy, n);
}
// Lanes from n on repeat the first one, which changes no extreme.
template <class T>
QK_INLINE typename Keys<T>::Vec load_keys(const T* p, int64_t n) {
  T copy[Keys<T>::kCount];
  for (int i = 0; i < Keys<T>::kCount; ++i) copy[i] = p[i < n ? i : 0];
  return Keys<T>::load(copy);
}
