"""Scores of `dense_simulation.py` for methods that rank by what comes later: the next entries, or queries to come."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from tests import calibrations


@cache
def _rotation(frequencies: tuple[float, ...], position: int) -> np.ndarray:
    angles = np.array(frequencies) * position
    cos, sin = np.diag(np.cos(angles)), np.diag(np.sin(angles))
    return np.block([[cos, -sin], [sin, cos]])


@cache
def _mean_rotation(frequencies: tuple[float, ...], start: int, count: int) -> np.ndarray:
    return sum(_rotation(frequencies, start + t) for t in range(count)) / count


class LaterMethods:
    """Of one layer and head each; the fields are those of `Simulation`."""

    def _lagkv(self, place, n):
        o, tokens = self.o, self.cache[place].tokens
        start, size = max(o["sink"], self._protected()), o["partition"]
        whole = max(n - start, 0) // size
        scores = [math.inf] * n
        for p in range(whole - 1):
            first = start + p * size
            raw = [0.0] * size
            for source in (self.keys[place], self.values[place]):
                here, after = (source[tokens[first + lag : first + lag + size]] for lag in (0, size))
                low, high = after.min(axis=0), after.max(axis=0)
                width, noise = high - low, np.maximum(abs(low), abs(high)) / 4096
                spreads = []
                for entry in here:
                    y = [(x - a) / w if w > s else 0.0 for x, a, w, s in zip(entry, low, width, noise, strict=True)]
                    spreads.append(float(np.std(y, ddof=1)))
                shares = [math.exp(u - max(spreads)) for u in spreads]
                raw = [r + x / sum(shares) for r, x in zip(raw, shares, strict=True)]
            raw = [round(4096 * math.log2(r)) for r in raw]
            for j, r in enumerate(raw):
                below = sum((x, i) < (r, j) for i, x in enumerate(raw))
                scores[first + j] = r if o["cross"] else below / size
        return scores

    def _q_filters(self, place, n):
        direction = self.known["filters"][place]
        return [float(self.keys[place][token] @ direction) for token in self.cache[place].tokens]

    def _kvzap(self, place, n):
        weight, bias = self.known["weight"][place], self.known["bias"][place]
        return [round(4096 * float(self.hidden[place[0], token] @ weight + bias)) for token in self.cache[place].tokens]

    def _critical(self, place, s, forced):
        """What the base keeps of its share, then products."""
        o, lengths = self.own, self._lengths(place)
        free = sorted((j for j in range(len(s)) if j not in forced), key=lambda j: (-s[j], -j))
        first = set(free[: math.floor(o["phi"] * (self.keep - len(forced)))])
        return [math.inf if j in first else (x + o["eps"]) * lengths[j] for j, x in enumerate(s)]

    def _lengths(self, place):
        shape = self.layers, self.heads, self.group, self.keys.shape[3]
        output = calibrations.output_projection(*shape).astype(np.float64) if self.output is None else self.output
        values = self.values[place][self.cache[place].tokens]
        order = {"l1": 1, "l2": 2}[self.own["norm"]]
        return np.mean([np.linalg.norm(values @ matrix, order, axis=1) for matrix in output[place]], axis=0)

    def states(self, place):
        """What each entry carries, a tuple of numbers; None for what it does not."""
        carried = [x if isinstance(x, tuple) else (x,) for x in self.cache[place].carried]
        if self.policy != "critical":
            return carried
        base = [x if self.scorer == "h2o" else () for x in carried]
        return [(*x, length) for x, length in zip(base, self._lengths(place), strict=True)]

    def _lazy_eviction(self, place, n):
        o, head = self.o, self.cache[place]
        weights = self._weights(place, self._logits(place, n))
        now, states, scores = self.seen - self.prompt_len, [], []
        for j, token in enumerate(head.tokens):
            last, mri = head.carried[j] or (max(token - self.prompt_len, 0), 0)
            for q in range(o["window"]):
                c = self.seen - o["window"] + q - self.prompt_len + 1
                if c >= 1 and max(row[q][j] for row in weights) >= o["alpha"]:
                    last, mri = c, max(mri, c - last)
            states.append((last, mri))
            score = 2 / (1 + math.exp(min(80, 1 + (now - last) / (mri + 1e-5))))
            score += 2 / (1 + math.exp(min(80, mri - 1))) if mri > 0 else 0
            scores.append(float(np.float32(score)))
        head.carried = states
        return scores

    def _frequencies(self) -> np.ndarray:
        d = self.keys.shape[3]
        return np.array(self.inv_freq or [10000 ** (-2 * f / d) for f in range(d // 2)])

    def _turning(self, position: int) -> np.ndarray:
        """The real matrix [d, d] of RoPE at a position."""
        return self.rope_factor * _rotation(tuple(self._frequencies()), position)

    def _expected_attention(self, place, n):
        """Matrices and vectors after RoPE, with the keys as they are cached."""
        o, (layer, head) = self.o, place
        d = self.keys.shape[3]
        tokens = self.cache[place].tokens
        turn = self.rope_factor * _mean_rotation(tuple(self._frequencies()), self.seen, o["T"])
        shares = np.zeros(n)
        for g in range(self.group):
            row = layer, head * self.group + g
            if o["stats"] == "file":
                mean, covariance = self.known["mean"][row], self.known["covariance"][row]
            else:
                seen = range(self.seen - o["window"], self.seen)
                plain = [np.linalg.inv(self._turning(t)) @ self.queries[layer, t, row[1]] for t in seen]
                mean, covariance = np.mean(plain, axis=0), np.cov(np.array(plain).T, bias=True)
            if o["cov"] != "full":
                same = np.arange(d) % (d // 2)
                covariance = covariance * (same[:, None] == same) * (o["cov"] == "pairs")
            mean, covariance = turn @ mean, turn @ covariance @ turn.T
            keys = self.keys[layer, head, tokens]
            z = np.array([mean @ k / math.sqrt(d) + k @ covariance @ k / (2 * d) for k in keys])
            z[: o["sink"]] = -math.inf
            shares += np.exp(z - z.max()) / np.exp(z - z.max()).sum() / self.group
        scores = shares + o["eps"]
        if o["vnorm"]:
            scores = scores * np.linalg.norm(self.values[layer, head, tokens], axis=1)
        return [math.inf] * o["sink"] + scores[o["sink"] :].tolist()

    def _triattention(self, place, n):
        """The long form: cosines of the distances from queries to come, with keys as they were before RoPE."""
        layer, head = place
        half = self.keys.shape[3] // 2
        w = self._frequencies()
        tokens = np.array(self.cache[place].tokens)
        cached = self.keys[layer, head, tokens]
        keys = (cached[:, :half] + 1j * cached[:, half:]) * np.exp(-1j * tokens[:, None] * w) / self.rope_factor
        scores = []
        for g in range(self.group):
            row = layer, head * self.group + g
            m, e = self.known["mean_real"][row] + 1j * self.known["mean_imaginary"][row], self.known["mean_size"][row]
            phi = np.angle(m * keys.conj())
            total = np.zeros(n)
            for i in range(17):
                distances = self.seen - tokens + 2**i
                total += (np.abs(m) * np.abs(keys) * np.cos(w * distances[:, None] + phi)).sum(axis=1) / 17
            total = self.rope_factor**2 * (total + ((e - np.abs(m)) * np.abs(keys)).sum(axis=1))
            if self.o["z"]:
                ranked = total[self._protected() :]
                total = (total - ranked.mean()) / max(ranked.std(), 1e-6)
            scores.append(total)
        return np.max(scores, axis=0).tolist()
