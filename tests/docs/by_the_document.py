"""By the sections "Codecs" and "Signatures" of docs/protocol.md alone: plain Python, slow, and none of our code."""

import re
import struct
from ctypes import c_float
from math import ceil, isnan
from pathlib import Path

import blake3

DOCUMENT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
CENTROIDS = {
    int(bits): [float(centroid) for centroid in centroids.split(", ")]
    for bits, centroids in re.findall(r"^\| (\d) \| (0\.[\d., ]+) \|$", DOCUMENT, re.MULTILINE)
}
FLOATS = ("float32", "float16", "bfloat16")
LEVELS = {"int8": 127, "int4": 7, "ternary": 1}


class RefusedError(Exception):
    """The payload is none."""


def expect(holds):
    if not holds:
        raise RefusedError


class Bytes:
    def __init__(self, data):
        self._data, self._at = data, 0

    def take(self, count):
        expect(self._at + count <= len(self._data))
        self._at += count
        return self._data[self._at - count : self._at]

    def unpack(self, code, count):
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))

    def byte(self):
        return self.take(1)[0]

    def varint(self, *, most):
        taken = [self.byte()]
        while taken[-1] >= 128:
            expect(len(taken) < 5)
            taken.append(self.byte())
        expect(len(taken) == 1 or taken[-1] != 0)
        value = sum((byte & 127) << 7 * place for place, byte in enumerate(taken))
        expect(value <= most)
        return value

    def end(self):
        expect(self._at == len(self._data))


def decoded(payload, codec, sizes):
    """Values, in the order of the payload, by index, of a model of tensors of these sizes."""
    small, large, at = [], [], 0
    for size in sizes:
        (small if size <= 1024 else large).extend(range(at, at + size))
        at += size
    data = Bytes(payload)
    sparsifier, _, quantizer = codec.rpartition("+")
    of_small = quantizer if quantizer in FLOATS else "int8"
    if not sparsifier and of_small == quantizer:
        found = dict(enumerate(values(data, quantizer, at)))
    else:
        chosen = [large[rank] for rank in _choice(data, sparsifier, len(large))] if sparsifier else large
        of_both = values(data, of_small, len(small)) + values(data, quantizer, len(chosen))
        found = dict(zip([*small, *chosen], of_both, strict=True))
    data.end()
    return found


def _choice(data, sparsifier, of_large):
    kind, _, argument = sparsifier.partition(":")
    if kind != "randomk":
        return _ranks(data, of_large)
    (seed,) = data.unpack("Q", 1)
    return drawn(seed, min(of_large, max(1, round(float(argument) * of_large))), of_large)


def drawn(seed, k, of_large):
    edges = [i * of_large // max(k, 1) for i in range(k + 1)]
    return [edges[i] + ((splitmix64(seed, i) >> 32) * (edges[i + 1] - edges[i]) >> 32) for i in range(k)]


def splitmix64(seed, i):
    mask = 2**64 - 1
    z = (seed + (i + 1) * 0x9E3779B97F4A7C15) & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def _ranks(data, of_large):
    k = data.varint(most=of_large)
    if k in (0, of_large):
        return list(range(k))
    by_block = list(data.take(ceil(k / 512)))
    expect(max(by_block) <= 24)
    h = data.varint(most=(k + of_large // 2 ** min(by_block) + 7) // 8)
    cuts = [by_block[j // 512] for j in range(k)]
    low = [0] * k
    for b in range(max(by_block)):
        in_plane = [j for j in range(k) if cuts[j] > b]
        for j, bit in zip(in_plane, _bits(data.take(ceil(len(in_plane) / 8))), strict=False):
            low[j] |= bit << b
    ones = [at for at, bit in enumerate(_bits(data.take(h))) if bit]
    expect(len(ones) == k)
    ranks, rank = [], -1
    for j in range(k):
        high = ones[j] - (ones[j - 1] if j else -1) - 1
        rank += (high << cuts[j]) + low[j] + 1
        ranks.append(rank)
    expect(ranks[-1] < of_large)
    return ranks


def _bits(data):
    return [byte >> 7 - place & 1 for byte in data for place in range(8)]


def values(data, quantizer, n):
    kind, _, argument = quantizer.partition(":")
    if kind in FLOATS:
        return _floats(data, kind, n)
    blocks = ceil(n / 1024)
    if kind == "eden":
        return _eden(data, int(argument), n, blocks)
    scales = _scales(data, min(n, 1) if kind == "stc" else blocks)
    if kind in ("sign", "stc"):
        levels = [2 * symbol - 1 for symbol in symbols(data, n, 2)]
    else:
        most = int(argument) if kind == "qsgd" else LEVELS[kind]
        levels = [symbol - most for symbol in symbols(data, n, 2 * most + 1)]
    return [float32(level * scales[0 if kind == "stc" else i // 1024]) for i, level in enumerate(map(float, levels))]


def _floats(data, kind, n):
    if kind == "bfloat16":
        return [struct.unpack("<f", struct.pack("<I", upper << 16))[0] for upper in data.unpack("H", n)]
    return data.unpack("f" if kind == "float32" else "e", n)


def _scales(data, count):
    scales = data.unpack("f", count)
    expect(all(0 <= scale < float("inf") for scale in scales))
    return scales


def _eden(data, bits, n, blocks):
    (seed,) = data.unpack("Q", 1)
    scales = _scales(data, blocks)
    lengths = [min(1024, n - 1024 * block) for block in range(blocks)]
    lengths = [2 ** (length - 1).bit_length() for length in lengths]
    upper = [float32(centroid) for centroid in CENTROIDS[bits]]
    centroids = [-centroid for centroid in reversed(upper)] + upper
    found = iter(symbols(data, sum(lengths), 2**bits))
    made = []
    for scale, length in zip(scales, lengths, strict=True):
        block = butterflies([float32(centroids[next(found)] * scale) for _ in range(length)])
        made += [-value if is_flipped(seed, len(made) + e) else value for e, value in enumerate(block)]
    return made[:n]


def butterflies(y):
    h = 1
    while h < len(y):
        for i in range(len(y)):
            if i // h % 2 == 0:
                y[i], y[i + h] = float32(y[i] + y[i + h]), float32(y[i] - y[i + h])
        h *= 2
    return y


def is_flipped(seed, element):
    return splitmix64(seed, element // 64) >> element % 64 & 1


def symbols(data, n, alphabet):
    mode = data.byte()
    expect(mode in (0, 1))
    if mode == 1:
        return _ans(data, n, alphabet)
    width = next(width for width in (1, 2, 4, 8) if 2**width >= alphabet)
    bits = _bits(data.take(ceil(n * width / 8)))
    found = [int("".join(map(str, bits[i * width : (i + 1) * width])), 2) for i in range(n)]
    expect(all(symbol < alphabet for symbol in found))
    return found


def _ans(data, n, alphabet):
    first, last = data.byte(), data.byte()
    expect(first < last < alphabet)
    f = frequencies(data.take(last - first + 1))
    words = data.unpack("I", data.varint(most=ceil(3 * n / 4) + 2))
    expect(not words or words[-1] != 0)
    state, found = 0, []
    for _ in range(min(2, len(words))):
        state = state * 2**32 + words.pop()
    by_q = cumulated(f)
    for _ in range(n):
        q = state % 2**24
        s = next(s for s in range(len(f)) if by_q[s] <= q < by_q[s + 1])
        found.append(first + s)
        state = state // 2**24 * f[s] + q - by_q[s]
        if state < 2**32 and words:
            state = state * 2**32 + words.pop()
    expect(state == 0 and not words)
    return found


def frequencies(weight_bytes):
    weights = [weight(byte) for byte in weight_bytes]
    expect(any(weights))
    f = [1 + w * (2**24 - len(weights)) // sum(weights) for w in weights]
    f[f.index(max(f))] += 2**24 - sum(f)
    return f


def weight(byte):
    return (16 + byte % 16) * 2 ** (byte // 16) if byte else 0


def cumulated(f):
    return [sum(f[:s]) for s in range(len(f) + 1)]


def ans_encoded(found, first, weight_bytes):
    """Mode 1, with a histogram in which all symbols are."""
    f = frequencies(weight_bytes)
    by_q = cumulated(f)
    state, words = 0, []
    for symbol in reversed(found):
        s = symbol - first
        if state // 2**40 >= f[s]:
            words.append(state % 2**32)
            state //= 2**32
        state = state // f[s] * 2**24 + by_q[s] + state % f[s]
    while state:
        words.append(state % 2**32)
        state //= 2**32
    head = bytes([1, first, first + len(weight_bytes) - 1, *weight_bytes])
    return head + varint(len(words)) + struct.pack(f"<{len(words)}I", *words)


def varint(value):
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + varint(value // 128)


def ranks_encoded(ranks, cuts):
    """With an r for each block, of which any decodes."""
    gaps = [rank - before - 1 for before, rank in zip([-1, *ranks], ranks, strict=False)]
    planes = b"".join(
        packed([gap >> b & 1 for j, gap in enumerate(gaps) if cuts[j // 512] > b]) for b in range(max(cuts, default=0))
    )
    high = packed([bit for j, gap in enumerate(gaps) for bit in [0] * (gap >> cuts[j // 512]) + [1]])
    return varint(len(ranks)) + bytes(cuts) + varint(len(high)) + planes + high


def packed(bits):
    filled = [*bits, *[0] * (-len(bits) % 8)]
    return bytes(int("".join(map(str, filled[i : i + 8])), 2) for i in range(0, len(filled), 8))


def rounded(vector, codec):
    """To nearest, as `rounding` asks for: finite float32 numbers to such."""
    if codec == "float32":
        return list(vector)
    if codec == "float16":
        return [struct.unpack("<e", struct.pack("<e", max(-65504.0, min(65504.0, value))))[0] for value in vector]
    if codec == "bfloat16":
        return [_bfloat16(value) for value in vector]
    return [value for i in range(0, len(vector), 1024) for value in _int8(vector[i : i + 1024])]


def _bfloat16(value):
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    upper, lower = divmod(bits, 2**16)
    if lower > 2**15 or (lower == 2**15 and upper % 2):
        upper += 1
    if upper & 0x7F80 == 0x7F80:
        upper -= 1
    return struct.unpack("<f", struct.pack("<I", upper << 16))[0]


def _int8(block):
    largest = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]
    (bits,) = struct.unpack("<I", struct.pack("<f", largest / 127))
    (most,) = struct.unpack("<f", struct.pack("<I", bits - 1))
    scale = min(float32(max(map(abs, block)) / 127), most)
    if scale < 2**-126:
        return [0.0] * len(block)
    levels = [max(-127, min(127, round(float32(value / scale)))) for value in block]
    return [float32(float(level) * scale) for level in levels]


def float32(value):
    return c_float(value).value


def as_bits(values):
    """To compare by: -0 is not 0, and all NaN are one."""
    return [struct.pack("<f", float("nan") if isnan(value) else value) for value in values]


def signed(kind, statement):
    """The bytes that Ed25519 is computed over."""
    return f"broker-fl/{kind}/1".encode("ascii") + b"\x00" + statement.encode("ascii")


def update_statement(fields, *, manifest_digest, payload):
    """Of an update that was not noised."""
    facts = {name: fact for name, fact in fields.items() if name != "privacy"}
    facts |= {"manifest": manifest_digest, "payload_digest": blake3.blake3(payload).hexdigest()}
    written = (f'"{name}":' + (f'"{fact}"' if isinstance(fact, str) else repr(fact)) for name, fact in sorted(facts.items()))
    return "{" + ",".join(written) + "}"
