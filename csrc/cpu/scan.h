// The scan of a selective state space. Channels side by side are the lanes; every number of their states is a vector,
// which moves through time in the nearest cache. The gradient goes back chunk by chunk, from states that were kept.
#pragma once

#include "activation.h"
#include "banks.h"

namespace omnimoe::cpu::OMNIMOE_ISA {
namespace {

// So many rows of (I, S) as S vectors of channels, and back.
template <class A>
void load_states(const A* from, int64_t size, int count, typename Lanes<A>::Vector* to) {
  for (int64_t s = 0; s < size; ++s) {
    to[s] = typename Lanes<A>::Vector{};
    for (int i = 0; i < count; ++i) to[s][i] = from[i * size + s];
  }
}

template <class A>
void store_states(const typename Lanes<A>::Vector* from, int64_t size, int count, A* to) {
  for (int64_t s = 0; s < size; ++s)
    for (int i = 0; i < count; ++i) to[i * size + s] = from[s][i];
}

inline int64_t groups_of_channels(const Scan& a) { return ceil_div(a.channels, kChannelsAtOnce); }

// f(sequence, group of channels, scratch): the cut depends on the shapes alone, so that sums do not on the threads.
template <class F>
void by_channels(const Scan& a, int64_t bytes, const F& f) {
  const int64_t groups = groups_of_channels(a);
  for_each_task(a.threads, a.batch * groups, bytes + 1024,
                [&](int64_t task, Scratch& scratch) { f(task / groups, task % groups, scratch); });
}

// f(first channel, lanes) for every block of a group of channels.
template <class A, class F>
void in_lanes(const Scan& a, int64_t group, const F& f) {
  const int64_t end = least((group + 1) * kChannelsAtOnce, a.channels);
  for (int64_t c = group * kChannelsAtOnce; c < end; c += Lanes<A>::count) f(c, int(least(Lanes<A>::count, end - c)));
}

// Which block of its group begins at a channel.
template <class A>
inline int64_t block_of(int64_t channel) {
  return channel % kChannelsAtOnce / Lanes<A>::count;
}

template <class A>
inline A* state_at(const void* states, const Scan& a, int64_t sequence, int64_t channel) {
  return static_cast<A*>(const_cast<void*>(states)) + (sequence * a.channels + channel) * a.size;
}

template <class A>
void scan(const Scan& a) {
  using V = typename Lanes<A>::Vector;
  const auto *x = static_cast<const A*>(a.x), *step = static_cast<const A*>(a.step);
  const auto *into = static_cast<const A*>(a.into), *out = static_cast<const A*>(a.out);
  by_channels(a, 2 * a.size * int64_t{sizeof(V)}, [&](int64_t b, int64_t group, Scratch& scratch) {
    V *rate = scratch.take<V>(a.size), *state = scratch.take<V>(a.size);
    in_lanes<A>(a, group, [&](int64_t c, int count) {
      load_states<A>(static_cast<const A*>(a.rate) + c * a.size, a.size, count, rate);
      if (a.state)
        load_states<A>(state_at<A>(a.state, a, b, c), a.size, count, state);
      else
        std::memset(state, 0, a.size * sizeof(V));
      for (int64_t t = 0; t < a.length; ++t) {
        if (t % kScanChunk == 0)
          store_states<A>(state, a.size, count, state_at<A>(a.kept, a, t / kScanChunk * a.batch + b, c));
        const int64_t row = b * a.length + t, at = row * a.channels + c;
        if (a.starts && a.starts[row]) std::memset(state, 0, a.size * sizeof(V));
        const V moved = load_some(step + at, count), driven = moved * load_some(x + at, count);
        V read = {};
        for (int64_t s = 0; s < a.size; ++s) {
          const V now = exponential(moved * rate[s]) * state[s] + driven * into[row * a.size + s];
          state[s] = now;
          read += now * out[row * a.size + s];
        }
        store_some(static_cast<A*>(a.y) + at, read, count);
      }
      store_states<A>(state, a.size, count, state_at<A>(a.last, a, b, c));
    });
  });
}

// With w[t] = grad[t] out[t] + decay[t + 1] w[t + 1], the gradient of the state after t:
// d out = sum of grad h, d into = sum of w step x, d x = step (w . into), d step = x (w . into) + f . rate and
// d rate = sum of f step, f being w decay[t] h[t - 1].
template <class A>
void scan_backward(const ScanBackward& b) {
  using V = typename Lanes<A>::Vector;
  const Scan& a = b.forward;
  const auto *x = static_cast<const A*>(a.x), *step = static_cast<const A*>(a.step), *grad = static_cast<const A*>(b.grad);
  const auto *into = static_cast<const A*>(a.into), *out = static_cast<const A*>(a.out);
  const int64_t size = a.size, vector = sizeof(V), chunks = ceil_div(a.length, kScanChunk);
  const int64_t groups = groups_of_channels(a), blocks = ceil_div(kChannelsAtOnce, Lanes<A>::count);
  const int64_t bytes = (2 + 2 * blocks + 4 * kScanChunk + 1) * size * vector;
  by_channels(a, bytes, [&](int64_t sequence, int64_t group, Scratch& scratch) {
    V *rate = scratch.take<V>(size), *wanted = scratch.take<V>(size);
    V *carried = scratch.take<V>(blocks * size), *grad_rate = scratch.take<V>(blocks * size);
    V *states = scratch.take<V>((kScanChunk + 1) * size), *decays = scratch.take<V>(kScanChunk * size);
    V *read = scratch.take<V>(kScanChunk * size), *written = scratch.take<V>(kScanChunk * size);
    std::memset(grad_rate, 0, blocks * size * vector);
    in_lanes<A>(a, group, [&](int64_t c, int count) {
      load_states<A>(state_at<A>(b.grad_last, a, sequence, c), size, count, carried + block_of<A>(c) * size);
    });
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t first = chunk * kScanChunk, held = least(kScanChunk, a.length - first);
      std::memset(read, 0, held * size * vector);
      std::memset(written, 0, held * size * vector);
      in_lanes<A>(a, group, [&](int64_t c, int count) {
        V *later = carried + block_of<A>(c) * size, *of_rate = grad_rate + block_of<A>(c) * size;
        load_states<A>(static_cast<const A*>(a.rate) + c * size, size, count, rate);
        load_states<A>(state_at<A>(a.kept, a, chunk * a.batch + sequence, c), size, count, states);
        for (int64_t t = 0; t < held; ++t) {
          const int64_t row = sequence * a.length + first + t, at = row * a.channels + c;
          const V moved = load_some(step + at, count), driven = moved * load_some(x + at, count);
          const bool forgets = a.starts && a.starts[row];
          for (int64_t s = 0; s < size; ++s) {
            const V decay = forgets ? V{} : exponential(moved * rate[s]);
            decays[t * size + s] = decay;
            states[(t + 1) * size + s] = (forgets ? V{} : decay * states[t * size + s]) + driven * into[row * size + s];
          }
        }
        for (int64_t t = held - 1; t >= 0; --t) {
          const int64_t row = sequence * a.length + first + t, at = row * a.channels + c;
          const V moved = load_some(step + at, count), entered = load_some(x + at, count);
          const V given = load_some(grad + at, count), driven = moved * entered;
          V by_input = {}, by_rate = {};
          for (int64_t s = 0; s < size; ++s) {
            const V want = given * out[row * size + s] + later[s];
            read[t * size + s] += given * states[(t + 1) * size + s];
            written[t * size + s] += want * driven;
            by_input += want * into[row * size + s];
            later[s] = want * decays[t * size + s];
            const V faded = later[s] * states[t * size + s];
            by_rate += faded * rate[s];
            of_rate[s] += faded * moved;
          }
          store_some(static_cast<A*>(b.grad_x) + at, by_input * moved, count);
          store_some(static_cast<A*>(b.grad_step) + at, by_input * entered + by_rate, count);
        }
      });
      const int64_t row = (group * a.batch + sequence) * a.length + first;
      for (int64_t i = 0; i < held * size; ++i) {
        static_cast<A*>(b.grad_out)[row * size + i] = sum<A>(read[i]);
        static_cast<A*>(b.grad_into)[row * size + i] = sum<A>(written[i]);
      }
    }
    in_lanes<A>(a, group, [&](int64_t c, int count) {
      store_states<A>(carried + block_of<A>(c) * size, size, count, state_at<A>(b.grad_state, a, sequence, c));
      store_states<A>(grad_rate + block_of<A>(c) * size, size, count, state_at<A>(b.grad_rate, a, sequence, c));
    });
  });
}

}  // namespace
}  // namespace omnimoe::cpu::OMNIMOE_ISA
