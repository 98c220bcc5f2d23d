"""What each policy keeps, one layer, head and slot at a time, in float64: written from the definitions alone.

Nothing here comes from `zipage`: defaults, random numbers and protection are its own. Calibrations are those of
`tests/calibrations.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from tests import calibrations
from tests.eviction.dense_later import LaterMethods

DEFAULTS = {
    "zipage": {
        "window": 16,
        "global": True,
        "alpha": 0.8,
        "pooling": "first",
        "pool_width": 5,
        "redundancy": "chunk",
        "chunk": 256,
        "lambda": 0.2,
        "tau": 0.4,
        "max_norm": False,
    },
    "snapkv": {
        "window": 16,
        "softmax": "all",
        "group": "mean",
        "pooling": "always",
        "pool_width": 5,
        "pool_kind": "mean",
    },
    "h2o": {"window": 16, "decay": 1.0, "group": "mean"},
    "tova": {"window": 1, "reduce": "layer"},
    "streaming": {},
    "r_kv": {"window": 8, "lambda": 0.1, "tau": 1.0, "threshold": 0.5, "pooling": "always", "pool_width": 7},
    "g_kv": {"window": 16, "alpha": 0.8, "lambda": 0.5, "tau": 1.0},
    "morphkv": {"window": 16, "fuse": "sum"},
    "keydiff": {},
    "knorm": {},
    "vase": {"mode": "attn", "window": 16, "reserve": 0.25, "pool_width": 5},
    "lagkv": {"partition": 128, "sink": 4, "cross": False},
    "q_filters": {"calibration": ""},
    "triattention": {"calibration": "", "z": True, "scope": "local"},
    "expected_attention": {
        "stats": "file",
        "calibration": "",
        "window": 16,
        "cov": "full",
        "T": 512,
        "sink": 4,
        "eps": 0.0,
        "vnorm": True,
    },
    "kvzap": {"calibration": ""},
    "critical": {"base": "snapkv", "phi": 0.5, "eps": 1e-4, "norm": "l1"},
    "lazy_eviction": {"observe": "window", "window": 16, "alpha": 1e-4},
    "random": {},
    "random_shared": {"share": "heads"},
    "page_attention": {"page_size": 256, "scope": "shared", "window": 16, "agg": "sum"},
    "page_random": {"page_size": 256, "scope": "shared"},
}
STREAMS = {"random": 1, "random_shared": 2, "vase": 3, "dkv": 4, "page_random": 5}


@dataclass
class Head:
    """One layer's KV head: the token in every slot, and the score it carries or None."""

    tokens: list[int] = field(default_factory=list)
    carried: list[float | None] = field(default_factory=list)


@dataclass
class Simulation(LaterMethods):
    """One request under one policy.

    Attributes:
        keys, values: [L, H, T, d]; queries: [L, T, Hq, d]; arrays of float64.
        hidden: [L, T, width], what keys and queries are projections of; None where no scorer reads them.
        output: [L, H, G, d, width], the output projection; None: made up.
        inv_freq, rope_factor: of the rotary embedding that is in keys and queries; None: 10000^(-2f/d).
        scale, soft_cap, sinks: of attention; sinks [L, Hq]. None: 1 / sqrt(d), no cap, none.
    """

    policy: str
    options: dict
    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray
    seed: int
    prompt_len: int
    keep: int
    recent: int
    protection: str
    hidden: np.ndarray | None = None
    output: np.ndarray | None = None
    inv_freq: list[float] | None = None
    rope_factor: float = 1.0
    scale: float | None = None
    soft_cap: float | None = None
    sinks: np.ndarray | None = None

    def __post_init__(self):
        self.scorer = self.options.get("base", "snapkv") if self.policy == "critical" else self.policy
        unknown = set(self.options) - set(DEFAULTS[self.scorer]) - set(DEFAULTS[self.policy]) - {"native"}
        assert not unknown, unknown
        self.own = DEFAULTS[self.policy] | self.options
        # An option of both is the wrapper's.
        inner = {name: x for name, x in self.options.items() if name not in DEFAULTS["critical"]}
        self.o = DEFAULTS[self.scorer] | inner if self.policy == "critical" else self.own
        self.layers, self.heads = self.keys.shape[:2]
        self.group = self.queries.shape[2] // self.heads
        self.cache = {(layer, head): Head() for layer in range(self.layers) for head in range(self.heads)}
        width = [] if self.hidden is None else [self.hidden.shape[2]]
        made_up = calibrations.arrays(self.scorer, self.layers, self.heads, self.group, self.keys.shape[3], *width)
        self.known = {name: array.astype(np.float64) for name, array in made_up.items()}
        self.seen = 0
        self.t = 0

    def run(self, lengths: list[int]) -> list[dict[tuple[int, int], list[int]]]:
        """Kept positions after each event, per (layer, head)."""
        history = []
        for n in lengths:
            self._grow(n)
            slots = self._event(n)
            protected = self._protected()
            for place, head in self.cache.items():
                head.tokens = [head.tokens[j] for j in slots[place]]
                head.carried = [head.carried[j] if j >= protected else None for j in slots[place]]
            self.t += 1
            history.append({place: list(head.tokens) for place, head in self.cache.items()})
        return history

    def _grow(self, n: int) -> None:
        new = n - len(self.cache[0, 0].tokens)
        for head in self.cache.values():
            head.tokens += range(self.seen, self.seen + new)
            head.carried += [None] * new
        self.seen += new

    # Common ground.

    def _protected(self) -> int:
        page = self.o.get("page_size", 1)
        protection = self.protection
        if self.policy == "streaming" and protection == "none":
            protection = "sink:4"
        if protection == "none":
            return 0
        if protection == "prompt" and page == 1:
            return min(self.prompt_len, self.keep - self.recent - 1)
        if protection == "prompt":
            pages = self.keep // page - math.ceil(self.recent / page)
            return min(self.prompt_len, (pages - 1) * page)
        return int(protection.split(":")[1])

    def _must(self, n: int) -> set[int]:
        return set(range(self._protected())) | set(range(n - self.recent, n))

    def _best(self, scores: list[float], forced: set[int]) -> list[int]:
        rest = sorted((j for j in range(len(scores)) if j not in forced), key=lambda j: (-scores[j], -j))
        return sorted(forced | set(rest[: self.keep - len(forced)]))

    def _event(self, n: int) -> dict[tuple[int, int], list[int]]:
        forced = self._must(n)
        if self.policy.startswith("page"):
            return self._pages(n, forced)
        if self.policy == "vase" and self.o["mode"] == "attn":
            return {place: self._vase(place, n, forced) for place in self.cache}
        score = self._dkv if self.policy == "vase" else getattr(self, "_" + self.scorer)
        scores = {place: score(place, n) for place in self.cache}
        if self.policy == "triattention" and self.o["scope"] == "shared":
            for head in range(self.heads):
                mean = np.mean([scores[layer, head] for layer in range(self.layers)], axis=0).tolist()
                scores |= {(layer, head): mean for layer in range(self.layers)}
        if self.scorer == "tova" and self.o["reduce"] == "layer":
            for layer in range(self.layers):
                rows = [scores[layer, head] for head in range(self.heads)]
                mean = [sum(row[j] for row in rows) / len(rows) for j in range(n)]
                for head in range(self.heads):
                    scores[layer, head] = mean
        if self.policy == "critical":
            scores = {place: self._critical(place, scores[place], forced) for place in self.cache}
        return {place: self._best(scores[place], forced) for place in self.cache}

    # Attention.

    def _logits(self, place, n: int) -> list[list[np.ndarray]]:
        """[g][q] -> n logits, hidden ones -inf."""
        layer, head = place
        keys = self.keys[layer, head, self.cache[place].tokens]
        window = self.o["window"]
        rows = []
        for g in range(self.group):
            rows.append([])
            for q in range(window):
                query = self.queries[layer, self.seen - window + q, head * self.group + g]
                logits = keys @ query * (self.scale or 1 / math.sqrt(keys.shape[1]))
                if self.soft_cap:
                    logits = self.soft_cap * np.tanh(logits / self.soft_cap)
                logits[n - window + q + 1 :] = -math.inf
                rows[-1].append(logits)
        return rows

    def _attention(self, place, n: int, softmax: str, group: str, fuse: str) -> list[float]:
        window = self.o["window"]
        rows = self._logits(place, n)
        if softmax != "all":
            for row in rows:
                for logits in row:
                    logits[n - window :] = -math.inf
        if softmax == "group_cut":
            rows = [[np.maximum.reduce([rows[g][q] for g in range(self.group)]) for q in range(window)]]
        weights = [[x.tolist() for x in row] for row in self._weights(place, rows)]
        over_group = {"max": max, "mean": lambda x: sum(x) / len(x)}[group]
        over_window = {"mean": lambda x: sum(x) / len(x), "sum": sum, "max": max}[fuse]
        return [
            float(over_window([over_group([row[q][j] for row in weights]) for q in range(window)])) for j in range(n)
        ]

    def _weights(self, place, rows):
        """Softmax of each query's logits, of which the head's sink takes its share; of a group's, the highest one."""
        layer, head = place
        sinks = [-math.inf] * self.group
        if self.sinks is not None:
            sinks = self.sinks[layer, head * self.group : (head + 1) * self.group].tolist()
        sinks = sinks if len(rows) == self.group else [max(sinks)]
        weights = []
        for row, sink in zip(rows, sinks, strict=True):
            tops = [max(z.max(), sink) for z in row]
            weights.append(
                [np.exp(z - top) / (np.exp(z - top).sum() + math.exp(sink - top)) for z, top in zip(row, tops)]
            )
        return weights

    def _pooled(self, scores: list[float], pooling: str, width: int, kind: str, limit: int) -> list[float]:
        if pooling == "never" or (pooling == "first" and self.t > 0):
            return scores
        out = list(scores)
        for j in range(limit):
            near = scores[max(0, j - width // 2) : min(limit, j + width // 2 + 1)]
            out[j] = max(near) if kind == "max" else sum(near) / width
        return out

    # Redundancy.

    def _redundancy(self, place, n: int, tau: float, chunk: int, threshold: float = 0.5) -> list[float]:
        layer, head = place
        units = [k / max(np.linalg.norm(k), 1e-6) for k in self.keys[layer, head, self.cache[place].tokens]]
        values = []
        for start in range(0, n, chunk):
            members = units[start : start + chunk]
            raw = raw_sums(members, threshold)
            values += [x / (tau * len(members)) for x in raw]
        top = max(values)
        total = sum(math.exp(x - top) for x in values)
        return [math.exp(x - top) / total for x in values]

    # Policies: scores of one layer and head.

    def _zipage(self, place, n):
        o, head = self.o, self.cache[place]
        s = self._attention(place, n, "all", "max", "mean")
        if o["max_norm"]:
            s = _over_maximum(s)
        if o["global"]:
            s = [x if old is None else max(x, o["alpha"] * old) for x, old in zip(s, head.carried, strict=True)]
            head.carried = list(s)
        s = self._pooled(s, o["pooling"], o["pool_width"], "max", n)
        if o["redundancy"] == "none":
            return s
        r = self._redundancy(place, n, o["tau"], o["chunk"] if o["redundancy"] == "chunk" else n)
        if o["max_norm"]:
            r = _over_maximum(r)
        return [o["lambda"] * x - (1 - o["lambda"]) * y for x, y in zip(s, r, strict=True)]

    def _snapkv(self, place, n):
        o = self.o
        s = self._attention(place, n, o["softmax"], o["group"], "mean")
        return self._pooled(s, o["pooling"], o["pool_width"], o["pool_kind"], n - o["window"])

    def _h2o(self, place, n):
        o, head = self.o, self.cache[place]
        a = self._attention(place, n, "all", o["group"], "mean")
        head.carried = [o["decay"] * (old or 0.0) + o["window"] * x for x, old in zip(a, head.carried, strict=True)]
        return list(head.carried)

    def _tova(self, place, n):
        return self._attention(place, n, "all", "mean", "mean")

    def _streaming(self, place, n):
        return list(range(n))

    def _r_kv(self, place, n):
        o = self.o
        a = self._attention(place, n, "group_cut", "max", "mean")
        a = self._pooled(a, o["pooling"], o["pool_width"], "max", n - o["window"])
        r = self._redundancy(place, n, o["tau"], n, o["threshold"])
        return [o["lambda"] * x - (1 - o["lambda"]) * y for x, y in zip(a, r, strict=True)]

    def _g_kv(self, place, n):
        o, head = self.o, self.cache[place]
        outside = n - o["window"]
        a = self._attention(place, n, "all", "max", "mean")
        top = max(a[:outside])
        s = [x / top for x in a]
        s = [x if old is None else max(x, o["alpha"] * old) for x, old in zip(s, head.carried, strict=True)]
        head.carried = s[:outside] + [None] * o["window"]
        r = self._redundancy(place, n, o["tau"], n)
        top = max(r[:outside])
        return [o["lambda"] * x - (1 - o["lambda"]) * y / top for x, y in zip(s, r, strict=True)]

    def _morphkv(self, place, n):
        return self._attention(place, n, "cut", "max", self.o["fuse"])

    def _keydiff(self, place, n):
        layer, head = place
        units = [k / max(np.linalg.norm(k), 1e-8) for k in self.keys[layer, head, self.cache[place].tokens]]
        anchor = sum(units) / n
        anchor = anchor / max(np.linalg.norm(anchor), 1e-8)
        return [-float(u @ anchor) for u in units]

    def _knorm(self, place, n):
        layer, head = place
        norms = [max(np.linalg.norm(k), 1e-8) for k in self.keys[layer, head, self.cache[place].tokens]]
        return [-round(4096 * math.log2(norm)) for norm in norms]

    def _random(self, place, n):
        layer, head = place
        return [uniform(self.seed, STREAMS["random"], self.t, layer, head, j) for j in range(n)]

    def _random_shared(self, place, n):
        layer = place[0] if self.o["share"] == "heads" else 0
        return [uniform(self.seed, STREAMS["random_shared"], self.t, layer, 0, j) for j in range(n)]

    def _vase(self, place, n, forced):
        """Two parts: the reserve of the widest values, then draws one after the other."""
        o = self.o
        layer, head = place
        values = self.values[layer, head, self.cache[place].tokens]
        widths = [max(max(v) - min(v), 1e-8) for v in values]
        wide = [math.inf if j < 4 else round(4096 * math.log2(width)) for j, width in enumerate(widths)]
        pool = [j for j in range(n) if j not in forced]
        free = self.keep - len(forced)
        pool.sort(key=lambda j: (-wide[j], -j))
        size = min(int(o["reserve"] * self.keep), free)
        reserve, rest = pool[:size], pool[size:]
        p = self._attention(place, n, "cut", "mean", "mean")
        p = self._pooled(p, "always", o["pool_width"], "mean", n - o["window"])
        clocks = {}
        for j in rest:
            u = uniform(self.seed, STREAMS["vase"], self.t, layer, head, j)
            # First arrivals of clocks with rates p are draws without replacement in proportion to p.
            clocks[j] = -math.log(u) / max(p[j], 1e-12)
        drawn = sorted(rest, key=lambda j: clocks[j])[: free - size]
        return sorted(forced | set(reserve) | set(drawn))

    def _dkv(self, place, n):
        layer, head = place
        d = self.keys.shape[3]
        count = d * 20
        numbers = []
        for i in range(count):
            u1 = uniform(self.seed, STREAMS["dkv"], self.t, 0, 0, i, bits=52)
            u2 = uniform(self.seed, STREAMS["dkv"], self.t, 0, 0, i + count, bits=52)
            numbers.append(math.sqrt(-2 * math.log(u1)) * math.cos(2 * math.pi * u2))
        matrix = np.array(numbers).reshape(d, 20) / math.sqrt(20)
        scores = []
        for j, token in enumerate(self.cache[place].tokens):
            k = matrix.T @ self.keys[layer, head, token]
            v = matrix.T @ self.values[layer, head, token]
            scores.append(math.inf if j < 4 else float((k @ k) * (v @ v)))
        return scores

    # Pages.

    def _pages(self, n: int, forced: set[int]) -> dict[tuple[int, int], list[int]]:
        size = self.o["page_size"]
        assert n % size == 0
        pages = range(n // size)
        bound = {j // size for j in forced}
        scores = {place: self._page_scores(place, n, size) for place in self.cache}
        if self.o["scope"] == "shared":
            mean = [sum(row[page] for row in scores.values()) / len(scores) for page in pages]
            scores = dict.fromkeys(scores, mean)
        kept = {}
        for place, row in scores.items():
            free = sorted((page for page in pages if page not in bound), key=lambda page: (-row[page], -page))
            chosen = sorted(bound | set(free[: self.keep // size - len(bound)]))
            kept[place] = [page * size + i for page in chosen for i in range(size)]
        return kept

    def _page_scores(self, place, n: int, size: int) -> list[float]:
        if self.policy == "page_random":
            layer, head = place if self.o["scope"] == "head" else (0, 0)
            return [uniform(self.seed, STREAMS["page_random"], self.t, layer, head, page) for page in range(n // size)]
        a = self._attention(place, n, "all", "mean", "mean")
        fuse = sum if self.o["agg"] == "sum" else max
        return [fuse(a[page * size : (page + 1) * size]) for page in range(n // size)]


def _over_maximum(values: list[float]) -> list[float]:
    top = max(values)
    return [x / top for x in values]


def raw_sums(units: list[np.ndarray], threshold: float = 0.5) -> list[float]:
    """Row sums of cosines; key j is left out of the sum of the highest m != j that it is near."""
    n = len(units)
    matrix = np.array(units)
    cosine = (matrix @ matrix.T).tolist()
    last = {}
    for j in range(n):
        for m in range(n - 1, -1, -1):
            if m != j and cosine[m][j] > threshold:
                last[j] = m
                break
    return [sum(cosine[m][j] for j in range(n) if j != m and last.get(j) != m) for m in range(n)]


def uniform(seed: int, stream: int, t: int, layer: int, head: int, slot: int, bits: int = 23) -> float:
    """SplitMix64's finaliser over one counter after the other; the top `bits` bits, halfway between two of them."""
    word = 2**64 - 1
    golden = 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        return x ^ (x >> 31)

    state = mix((seed + golden) & word)
    for counter in (stream, t, layer, head, slot):
        state = mix((state + golden * (counter + 1)) & word)
    return ((state >> (64 - bits)) + 0.5) / 2**bits
