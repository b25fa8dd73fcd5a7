"""The passes of the fused engine on a GPU, in Triton; engine.py holds their maths and calls them.

A layer's neurons over all time-steps are one contiguous matrix x[t][n][c], channels innermost,
n = (b, h, w). In memory x, spikes and gradients are float32, float64, bfloat16 or float16; all
arithmetic, membranes and sums are in the dtype of the scales a and b (float32; float64 for float64).

The two LIF passes work on tiles of P pooling windows, their Q = pool * pool pixels and BC neighbouring
channels: forwards pixel by pixel, [P, BC], backwards as [P, Q, BC], Q rounded up to a power of two. A
program walks through all time-steps of its tile with the membranes in registers; the loop over T is a
loop of the kernel, so T = 1000 compiles no slower than T = 1. Sums over n are written once per program
and added up in a fixed order, without atomics: one machine gives the same bits every time. Nothing asks
the GPU for a value, so the passes can be captured in a CUDA graph (after one warm-up call, which
compiles them).
"""

import contextlib
import inspect

import torch
import triton
import triton.language as tl

STAGES = tl.constexpr(3)  # loads of so many time-steps are under way at once
WIDEST = 4  # a pool whose windows `_lif_forward` goes through pixel by pixel; each pixel is code of its own


# ---- Kernels -------------------------------------------------------------------------------------


def _kernel(function):
    """A Triton kernel. It is not compiled anew for sizes that 16 divides or that are 1: of those only C and a count,
    which masks are made of, decide how wide a load can be."""
    sizes = {"T", "N", "B", "H", "W", "tiles"}
    return triton.jit(function, do_not_specialize=[n for n in inspect.signature(function).parameters if n in sizes])


@_kernel
def _statistics(x, partial, N, C, ROWS: tl.constexpr, R: tl.constexpr, BC: tl.constexpr):
    """partial[piece, 0 or 1, t, c]: sum of v and of v * v over a piece's rows, v = x[t, n, c] - x[t, 0, c]."""
    piece, t = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    acc = partial.dtype.element_ty
    x += tl.cast(t, tl.int64) * N * C
    pivot = tl.load(x + c, mask=c < C, other=0.0).to(acc)[None, :]
    s1, s2 = tl.zeros([R, BC], acc), tl.zeros([R, BC], acc)
    end = tl.minimum(piece * ROWS + ROWS, N)
    for n0 in tl.range(piece * ROWS, end, R, num_stages=STAGES):
        n = n0 + tl.arange(0, R)
        inside = (n < end)[:, None] & (c < C)[None, :]
        v = tl.load(x + n[:, None] * C + c[None, :], mask=inside, other=0.0).to(acc) - pivot
        v = tl.where(inside, v, 0.0)
        s1 += v
        s2 += v * v
    steps = tl.num_programs(2)
    to = partial + (piece * 2 * steps + t) * C + c
    tl.store(to, tl.sum(s1, 0), mask=c < C)
    tl.store(to + steps * C, tl.sum(s2, 0), mask=c < C)


@triton.jit
def _tile(i, B, H, W, C, POOL: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BC: tl.constexpr):
    """Where tile i of this program's channels lies, as tiles [P, Q, BC].

    Returns (c [BC], inputs, inside, outputs, whole): offsets of the neurons within a time-step and which
    exist; offsets of their pooled output and which have one (AvgPool2d drops odd edges).
    """
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    window, q = i * P + tl.arange(0, P), tl.arange(0, Q)
    across, down = (W + POOL - 1) // POOL, (H + POOL - 1) // POOL
    j, k, b = window % across, window // across % down, window // (across * down)
    y, x = k[:, None] * POOL + (q // POOL)[None, :], j[:, None] * POOL + (q % POOL)[None, :]
    inside = (b < B)[:, None] & (y < H) & (x < W) & (q < POOL * POOL)[None, :]
    whole = (b < B) & (k < H // POOL) & (j < W // POOL)
    inputs = ((b[:, None] * H + y) * W + x)[:, :, None] * C + c[None, None, :]
    outputs = (((b * (H // POOL) + k) * (W // POOL) + j) * C)[:, None, None] + c[None, None, :]
    outputs = tl.broadcast_to(outputs, [P, Q, BC])
    real = (c < C)[None, None, :]
    return c, inputs, inside[:, :, None] & real, outputs, whole[:, None, None] & inside[:, :, None] & real


@triton.jit
def _vector(v, t, c, C):
    """v[t, c], [BC]; it broadcasts to a tile."""
    return tl.load(v + t * C + c, mask=c < C, other=0.0)


@triton.jit
def _left(m, leak, LEAK: tl.constexpr):
    """LEAK * m, or the number that lies at `leak` times m, where that is not None."""
    return LEAK * m if leak is None else tl.load(leak) * m


@triton.jit
def _fires(u, theta, THETA: tl.constexpr):
    return u > THETA if theta is None else u > tl.load(theta)


@triton.jit
def _step(m, left, current, theta, THETA: tl.constexpr, FIRE_FIRST: tl.constexpr, HARD: tl.constexpr):
    """One time-step of the neurons, of whose membrane m `left` is left by the leak: (voltage that decides, spikes,
    membrane after)."""
    u = m if FIRE_FIRST else left + current
    spikes = _fires(u, theta, THETA).to(m.dtype)
    lost = THETA * spikes if theta is None else tl.load(theta) * spikes
    m = u * (1.0 - spikes) if HARD else (left + current if FIRE_FIRST else u) - lost
    return u, spikes, m


@_kernel
def _lif_forward(
    x, a, b, membrane, spikes, packed, leak, theta, T, B, H, W, C,
    LEAK: tl.constexpr, THETA: tl.constexpr, FIRE_FIRST: tl.constexpr, HARD: tl.constexpr, START: tl.constexpr,
    POOL: tl.constexpr, P: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """P windows, all time-steps. membrane [N, C] or None: read if START, and written. packed: or None. leak, theta:
    LEAK and THETA where they are learnt, or None.

    The pixels of a window are tiles [P, BC] of their own, one after the other: as one tile, its sum over them goes
    from thread to thread.
    """
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    window, real = tl.program_id(0) * P + tl.arange(0, P), (c < C)[None, :]
    across, down = (W + POOL - 1) // POOL, (H + POOL - 1) // POOL
    j, k, image = window % across, window // across % down, window // (across * down)
    outputs = (((image * (H // POOL) + k) * (W // POOL) + j) * C)[:, None] + c[None, :]
    whole = ((image < B) & (k < H // POOL) & (j < W // POOL))[:, None] & real
    full, pooled = tl.cast(B * H * W, tl.int64) * C, tl.cast(B * (H // POOL) * (W // POOL), tl.int64) * C
    places, exist, m = (), (), ()
    for q in tl.static_range(POOL * POOL):
        y, z = k * POOL + q // POOL, j * POOL + q % POOL
        inside = ((image < B) & (y < H) & (z < W))[:, None] & real
        inputs = (((image * H + y) * W + z) * C)[:, None] + c[None, :]
        before = tl.zeros([P, BC], a.dtype.element_ty)
        if START:
            before = tl.load(membrane + inputs, mask=inside, other=0.0)
        places, exist, m = places + (inputs,), exist + (inside,), m + (before,)
    for t in tl.range(T, num_stages=STAGES):
        gain, offset = _vector(a, t, c, C), _vector(b, t, c, C)
        count, after = tl.zeros([P, BC], a.dtype.element_ty), ()
        for q in tl.static_range(POOL * POOL):
            v = tl.load(x + t * full + places[q], mask=exist[q], other=0.0).to(count.dtype)
            _, spikes_q, m_q = _step(m[q], _left(m[q], leak, LEAK), gain * v + offset, theta, THETA, FIRE_FIRST, HARD)
            count, after = count + spikes_q, after + (m_q,)
        m = after
        share = count * (1.0 / (POOL * POOL))
        tl.store(spikes + t * pooled + outputs, share.to(spikes.dtype.element_ty), mask=whole)
        if packed is not None:
            tl.store(packed + t * pooled + outputs, count.to(tl.int32).to(tl.uint8), mask=whole)
    if membrane is not None:
        for q in tl.static_range(POOL * POOL):
            tl.store(membrane + places[q], m[q], mask=exist[q])


@_kernel
def _lif_backward(
    x, a, b, centre, membrane, grad, carry, delta, partial, borders, scratch, leak, theta, earlier,
    T, B, H, W, C, tiles,
    LEAK: tl.constexpr, THETA: tl.constexpr, ALPHA: tl.constexpr, FIRE_FIRST: tl.constexpr, HARD: tl.constexpr,
    START: tl.constexpr, CHUNK: tl.constexpr, POOL: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Every G-th tile of one block of channels, G = the number of such programs; all time-steps.

    The reverse scan wants h(u_t), last step first, and T tiles do not fit in registers. So time is cut
    into chunks of CHUNK steps, and a tile goes: forwards once, leaving the membrane at the start of each
    chunk in `borders`; then for each chunk, last one first, forwards again, leaving h in `scratch`, and
    backwards. With one chunk the first part is no work at all. Both buffers belong to the program and
    are used again for its next tile, so they and the second reading of x are meant for the L2 cache:
    from and to memory go x, grad and delta, and x once more where T > CHUNK.

    S1, S2 and S3 of the program's tiles are added up in its own `partial[program, 0 to 2, t, c]` (or None). leak,
    theta: LEAK and THETA where they are learnt, or None. earlier: None, or as large as `scratch`, for the membranes
    before each step of a chunk, where S3 is wanted.
    The barriers stand between writing and reading again what another thread of the program wrote.
    """
    SIZE: tl.constexpr = P * Q * BC
    KINDS: tl.constexpr = 2 if earlier is None else 3
    acc = a.dtype.element_ty
    full, pooled = tl.cast(B * H * W, tl.int64) * C, tl.cast(B * (H // POOL) * (W // POOL), tl.int64) * C
    program, chunks = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), (T + CHUNK - 1) // CHUNK
    row = tl.arange(0, P)[:, None, None] * Q + tl.arange(0, Q)[None, :, None]
    within = row * BC + tl.arange(0, BC)[None, None, :]
    borders += tl.cast(program, tl.int64) * chunks * SIZE + within
    scratch += tl.cast(program, tl.int64) * CHUNK * SIZE + within
    if earlier is not None:
        earlier += tl.cast(program, tl.int64) * CHUNK * SIZE + within
    if partial is not None:
        partial += tl.program_id(0) * KINDS * T * C
    for i in range(tl.program_id(0), tiles, tl.num_programs(0)):
        c, inputs, inside, outputs, whole = _tile(i, B, H, W, C, POOL, P, Q, BC)
        m, d = tl.zeros([P, Q, BC], acc), tl.zeros([P, Q, BC], acc)
        if membrane is not None:
            m = tl.load(membrane + inputs, mask=inside, other=0.0)
        if START:
            d = tl.load(carry + inputs, mask=inside, other=0.0)
        tl.store(borders, m)
        for k in range(1, chunks):
            for t in tl.range((k - 1) * CHUNK, k * CHUNK, num_stages=STAGES):
                v = tl.load(x + t * full + inputs, mask=inside, other=0.0).to(acc)
                gain, offset = _vector(a, t, c, C), _vector(b, t, c, C)
                _, _, m = _step(m, _left(m, leak, LEAK), gain * v + offset, theta, THETA, FIRE_FIRST, HARD)
            tl.store(borders + k * SIZE, m)
        for back in range(chunks):
            start = (chunks - 1 - back) * CHUNK
            steps = tl.minimum(CHUNK, T - start)
            tl.debug_barrier()
            m = tl.load(borders + (chunks - 1 - back) * SIZE)
            for s in tl.range(steps, num_stages=STAGES):
                t = start + s
                v = tl.load(x + t * full + inputs, mask=inside, other=0.0).to(acc)
                gain, offset = _vector(a, t, c, C), _vector(b, t, c, C)
                if earlier is not None:
                    tl.store(earlier + s * SIZE, m)
                u, _, m = _step(m, _left(m, leak, LEAK), gain * v + offset, theta, THETA, FIRE_FIRST, HARD)
                h = 1.0 - tl.abs((u * (1.0 / THETA) if theta is None else u / tl.load(theta)) - 1.0)
                h = tl.where(h < 0.0, 0.0, h)  # keeps a NaN
                if HARD:  # spikes are told by the sign
                    h = tl.where(_fires(u, theta, THETA), -1.0 - h, h)
                tl.store(scratch + s * SIZE, h.to(scratch.dtype.element_ty))
            tl.debug_barrier()
            for r in tl.range(steps, num_stages=STAGES):
                s = steps - 1 - r
                t = start + s
                h = tl.load(scratch + s * SIZE).to(acc)
                if HARD:
                    d = tl.where(h < 0.0, 0.0, d)  # nothing is left of the membrane
                    h = tl.where(h < 0.0, -1.0 - h, h)
                g = tl.load(grad + t * pooled + outputs, mask=whole, other=0.0, eviction_policy="evict_first").to(acc)
                if theta is None:  # eq. 8, and the pool's share
                    fed = g * (ALPHA / (THETA * POOL * POOL)) * h
                else:
                    fed = g * (ALPHA / (POOL * POOL)) * h / tl.load(theta)
                after = _left(d, leak, LEAK) + fed
                if not FIRE_FIRST:
                    d = after
                tl.store(delta + t * full + inputs, d.to(delta.dtype.element_ty), mask=inside)
                if partial is not None:
                    v = tl.load(x + t * full + inputs, mask=inside, other=0.0, eviction_policy="evict_first").to(acc)
                    product = d * (v - _vector(centre, t, c, C))  # outside the image d is 0
                    s1, s2 = tl.sum(tl.reshape(d, [P * Q, BC]), 0), tl.sum(tl.reshape(product, [P * Q, BC]), 0)
                    to = partial + t * C + c
                    s1 += tl.load(to, mask=c < C, other=0.0)
                    s2 += tl.load(to + T * C, mask=c < C, other=0.0)
                    tl.store(to, s1, mask=c < C)
                    tl.store(to + T * C, s2, mask=c < C)
                    if earlier is not None:
                        s3 = tl.sum(tl.reshape(d * tl.load(earlier + s * SIZE), [P * Q, BC]), 0)
                        tl.store(to + 2 * T * C, s3 + tl.load(to + 2 * T * C, mask=c < C, other=0.0), mask=c < C)
                d = after
        if carry is not None:
            tl.store(carry + inputs, d, mask=inside)


@_kernel
def _affine(delta, x, k1, k2, k3, N, C, R: tl.constexpr, BC: tl.constexpr):
    """delta <- k1 delta + k2 x + k3 on one tile [R, BC] of one time-step."""
    n, t = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(2)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (n < N)[:, None] & (c < C)[None, :]
    offset = tl.cast(t, tl.int64) * N * C + (n[:, None] * C + c[None, :])
    acc = k1.dtype.element_ty
    d, v = tl.load(delta + offset, mask=inside, other=0.0), tl.load(x + offset, mask=inside, other=0.0)
    rest = _vector(k2, t, c, C) * v.to(acc) + _vector(k3, t, c, C)
    tl.store(delta + offset, (_vector(k1, t, c, C) * d.to(acc) + rest).to(d.dtype), mask=inside)


@triton.jit
def _unpack(packed, spikes, count, SHARE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """spikes = SHARE * packed, for a block of them; ACC: the dtype of the product."""
    i = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tl.load(packed + i, mask=i < count, other=0).to(ACC)
    tl.store(spikes + i, (n * SHARE).to(spikes.dtype.element_ty), mask=i < count)


# ---- The passes as functions of tensors ------------------------------------------------------------


class TritonPasses:
    """The passes under the names, arguments and results of `CpuPasses` in cpu.py.

    The sizes of the work change nothing but speed and the order of sums. tile: neurons of a tile.
    tile_back: of a tile of `lif_backward`, in 16 bit; half as many in float32. channels: most channels of
    a tile. rows: rows that a program of `statistics` sums. chunk: time-steps that `lif_backward` keeps
    h(u) of. programs: how many of `lif_backward` run (None: two for each multiprocessor); their scratch
    takes programs * tile_back * chunk elements and is meant for the L2 cache.
    """

    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def __init__(self, tile=2048, channels=64, rows=2048, chunk=32, programs=None, tile_back=4096):
        self.tile, self.tile_back, self.channels, self.rows = tile, tile_back, channels, rows
        self.chunk, self.programs = chunk, programs

    def statistics(self, x, shape):
        """Mean and (biased) variance of x [T, B, H, W, C] over n: two float64 tensors [T, C]."""
        T, N, C = sizes = shape.T, shape.N, shape.C
        R, BC = self.blocks(shape, x.dtype)
        pieces = triton.cdiv(N, self.rows)
        partial = torch.empty(pieces, 2, T, C, dtype=_wide(x), device=x.device)
        _launch(_statistics, (pieces, triton.cdiv(C, BC), T), x, partial, N, C, ROWS=self.rows, R=R, BC=BC)
        first, second = partial.sum(0, dtype=torch.float64) / N
        return x.view(sizes)[:, 0].double() + first, (second - first**2).clamp(min=0)

    def lif_forward(self, x, shape, a, b, membrane, start, packed, fresh=True):
        """Pooled spikes, [T, B, H // pool, W // pool, C]; their counts go to `packed`, unless it is None.

        a, b: [T, C]. membrane: None, or [N, C], read if `start` and left as it is after the last step.
        """
        T, B, H, W, C = shape.full
        if (pool := shape.pool) > WIDEST:
            spikes = self.lif_forward(x, shape._replace(pool=1), a, b, membrane, start, None)
            h, w = H // pool, W // pool
            windows = spikes[:, :, : h * pool, : w * pool].reshape(T, B, h, pool, w, pool, C)
            counts = windows.sum((3, 5), dtype=_wide(x))
            if packed is not None:
                packed.copy_(counts)
            return (counts * (1 / pool**2)).to(x.dtype)
        spikes = torch.empty(shape.pooled, dtype=x.dtype, device=x.device)
        P, BC = self.blocks(shape, x.dtype, triton.next_power_of_2(pool))
        tiles = triton.cdiv(B * triton.cdiv(H, pool) * triton.cdiv(W, pool), P)
        constants = dict(POOL=pool, P=P, BC=BC) | _neuron(shape, start)
        tensors = (x, a, b, membrane, spikes, packed, *_learnt(shape, a))
        _launch(_lif_forward, (tiles, triton.cdiv(C, BC)), *tensors, *shape.full, **constants)
        return spikes

    def lif_backward(self, x, shape, a, b, centre, membrane, grad, carry, start, sums):
        """(delta, sums): delta like x, and S1, S2, and S3 if `sums` is 3, float64 [sums, T, C].

        grad: of the pooled spikes. centre: [T, C]. membrane: before the first step, or None at rest.
        carry: None, or [N, C], d of the step after the last, read if `start` and left as that of the first.
        """
        T, B, H, W, C = shape.full
        tiles, tiling = self.tiling(shape, x.dtype)
        blocks, size = triton.cdiv(C, tiling["BC"]), tiling["P"] * tiling["Q"] * tiling["BC"]
        grid = min(tiles, max(1, (self.programs or 2 * _multiprocessors(x.device)) // blocks)), blocks
        wide = dict(dtype=_wide(x), device=x.device)
        # h is between 0 and 1: float16 rounds it by 2^-12, where bfloat16 rounds grad and delta by 2^-9.
        half = dict(dtype=torch.float16 if x.dtype.itemsize == 2 else x.dtype, device=x.device)
        chunk = min(self.chunk, triton.next_power_of_2(T))
        borders = torch.empty(grid[0] * blocks, triton.cdiv(T, chunk), size, **wide)
        scratch = torch.empty(grid[0] * blocks, chunk, size, **half)
        partial = torch.zeros(grid[0], sums, T, C, **wide) if sums else None
        earlier = torch.empty(scratch.shape, **wide) if sums > 2 else None
        delta = torch.empty_like(x)
        _launch(
            _lif_backward, grid, x, a, b, centre, membrane, grad, carry, delta, partial, borders, scratch,
            *_learnt(shape, a), earlier, T, B, H, W, C, tiles,
            ALPHA=shape.alpha, CHUNK=chunk, **_neuron(shape, start), **tiling,
        )  # fmt: skip
        return delta, partial.sum(0, dtype=torch.float64) if sums else x.new_zeros(0, T, C)

    def affine(self, delta, x, shape, k1, k2, k3):
        """delta <- k1 delta + k2 x + k3 in place, coefficients [T, C]."""
        R, BC = self.blocks(shape, x.dtype)
        grid = triton.cdiv(shape.N, R), triton.cdiv(shape.C, BC), shape.T
        _launch(_affine, grid, delta, x, k1, k2, k3, shape.N, shape.C, R=R, BC=BC)
        return delta

    def unpack(self, packed, share, dtype):
        """share * packed in another dtype."""
        spikes, count = torch.empty(packed.shape, dtype=dtype, device=packed.device), packed.numel()
        acc = tl.float64 if dtype == torch.float64 else tl.float32
        _launch(_unpack, (triton.cdiv(count, self.tile),), packed, spikes, count, SHARE=share, ACC=acc, BLOCK=self.tile)
        return spikes

    def blocks(self, shape, dtype, pixels=1, tile=None):
        """(R, BC): how many windows of so many pixels, and how many channels, make a tile of numbers of `dtype`."""
        if shape.N * shape.C >= 2**31:
            raise ValueError(f"a layer of {shape.N * shape.C:,} neurons is too large for one batch: use a smaller one")
        tile = tile or self.tile // (2 if dtype == torch.float64 else 1)  # its registers are twice as many
        BC = min(self.channels, max(8, tile // pixels), triton.next_power_of_2(shape.C))
        return max(1, tile // (pixels * BC)), BC

    def tiling(self, shape, dtype):
        """For `lif_backward`: number of tiles for each block of channels, and the constants of a tile as keywords."""
        Q = triton.next_power_of_2(shape.pool**2)
        P, BC = self.blocks(shape, dtype, Q, 2 * self.tile_back // dtype.itemsize)
        windows = shape.B * triton.cdiv(shape.H, shape.pool) * triton.cdiv(shape.W, shape.pool)
        return triton.cdiv(windows, P), dict(POOL=shape.pool, P=P, Q=Q, BC=BC)


def _learnt(shape, a):
    """Leak and threshold in the dtype of arithmetic; None where one is a number, for which kernels are compiled."""
    return [v.to(a.dtype) if torch.is_tensor(v) else None for v in (shape.leak, shape.threshold)]


def _neuron(shape, start):
    leak, threshold = (None if torch.is_tensor(v) else v for v in (shape.leak, shape.threshold))
    kind = dict(FIRE_FIRST=shape.fire_first, HARD=shape.hard_reset)
    return dict(LEAK=leak, THETA=threshold, START=bool(start)) | kind


def _wide(x):
    """The dtype of arithmetic on x."""
    return torch.promote_types(x.dtype, torch.float32)


def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _launch(kernel, grid, x, *arguments, **constants):
    """Start a kernel where its first argument lies."""
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        kernel[grid](x, *arguments, **constants)
