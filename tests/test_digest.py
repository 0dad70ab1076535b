"""Digests cover shape, dtype and every byte, and nothing else."""

import hashlib

import pytest
import torch
from torch import nn

from pifa_compile.digest import CHUNK, cast_digests, digest, digest_many

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int8, torch.bool)
CASTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 40
    return values > 0 if dtype is torch.bool else values.to(dtype)


def by_the_book(t: torch.Tensor) -> str:
    """The definition, written a second time without chunks in parallel."""
    content = bytes(t.contiguous().view(-1).view(torch.uint8).numpy())
    name, shape = str(t.dtype).removeprefix("torch."), ",".join(map(str, t.shape))
    root = hashlib.sha256(f"pifa-compile tensor digest 1\n{name}\n{shape}\n".encode())
    for start in range(0, len(content), CHUNK * t.itemsize):
        root.update(hashlib.sha256(content[start : start + CHUNK * t.itemsize]).digest())
    return f"sha256:{root.hexdigest()}"


def test_a_digest_never_changes_between_versions():
    """Stores on disk depend on it."""
    assert digest(torch.arange(6, dtype=torch.float32).reshape(2, 3)) == (
        "sha256:72fd67ff6017075561f4221bd4f3c0afefb3d206d6081eb45310f7f8e80a01f1"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (3, CHUNK // 2 + 1), (0,), (4, 0)], ids=str)
def test_digest_is_as_defined(dtype, shape):
    t = noise(*shape, dtype=dtype)
    assert digest(t) == by_the_book(t)


def test_every_bit_the_shape_and_the_dtype_count():
    t = noise(3, CHUNK // 2 + 1)
    seen = {digest(t), digest(t.reshape(-1)), digest(t.T.contiguous()), digest(t.view(torch.int32))}
    for place in (0, CHUNK - 1, CHUNK, t.numel() - 1):
        changed = t.clone()
        changed.view(-1).view(torch.int32)[place] ^= 1
        seen.add(digest(changed))
    assert len(seen) == 8
    assert digest(torch.zeros(2)) != digest(-torch.zeros(2))
    assert len({digest(torch.zeros(shape)) for shape in [(0,), (0, 4), (4, 0), (), (1,), (1, 1)]}) == 6


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.T,
        lambda t: t[:, 1:-1],
        lambda t: t[::2],
        lambda t: t[:, ::3],
        lambda t: t[:, 0],
        lambda t: t.view(-1, 4, t.shape[1]).permute(2, 0, 1),
        lambda t: t[:1].expand(5, -1),
        lambda t: t.unsqueeze(0).expand(3, -1, -1),
        lambda t: t[:0].T,
    ],
    ids=["transposed", "narrow", "rows", "columns", "column", "permuted", "expanded", "stacked", "empty"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_count(view, dtype):
    for t in (view(noise(8, 9, dtype=dtype)), view(noise(4, CHUNK // 2 + 3, dtype=dtype))):
        assert digest(t) == digest(t.contiguous())
        assert cast_digests(t) == cast_digests(t.contiguous())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cast_digests_are_the_digests_of_casts(dtype):
    t = noise(5, CHUNK // 4 + 11, dtype=dtype)
    expected = {name: digest(t.to(cast)) for name, cast in CASTS.items()}
    own = {str(dtype).removeprefix("torch."): digest(t)}
    assert cast_digests(t) == expected | own
    assert cast_digests(t[:0]) == {name: digest(t[:0].to(cast)) for name, cast in CASTS.items()} | {
        name: digest(t[:0]) for name in own
    }


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        (torch.int16, torch.bfloat16),
        (torch.int16, torch.float16),
        (torch.int32, torch.float32),
        (torch.int64, torch.float64),
    ],
    ids=str,
)
def test_casts_of_every_kind_of_number(bits, dtype):
    """Subnormal, infinite and rounded to infinity; NaN has no one cast, its bits depend on the vector unit."""
    info = torch.iinfo(bits)
    t = torch.randint(info.min, info.max, (100_003,), dtype=bits, generator=torch.Generator().manual_seed(1)).view(
        dtype
    )
    edges = torch.tensor([0.0, -0.0, 65504.0, 65520.0, 1e-8, 6e-8, 1e-40, 3.4e38, float("inf")], dtype=torch.float64)
    t = torch.cat([torch.where(t.isnan(), 1, t), edges.to(dtype), torch.linspace(-2, 2, 50_001).to(dtype)])
    assert cast_digests(t) == {n: digest(t.to(c)) for n, c in CASTS.items()} | {str(dtype)[6:]: digest(t)}


def test_whatever_holds_the_content_does_not_count():
    t = noise(6, 5)
    expected = digest(t)
    assert digest(nn.Parameter(t)) == digest(t.clone().requires_grad_()) == expected
    with torch.inference_mode():
        inside = t.clone()
        assert digest(inside) == expected
    assert digest(inside) == expected
    with torch.device("meta"):
        assert cast_digests(t.clone())["float32"] == expected


def test_many_are_the_same_as_one_by_one():
    tensors = [noise(3, 4), noise(2, CHUNK, dtype=torch.bfloat16), noise(0), noise(7, dtype=torch.int8), noise(9, 9).T]
    assert digest_many(tensors) == [digest(t) for t in tensors]
    assert digest_many([]) == []


@pytest.mark.parametrize("t", [torch.empty(3, device="meta"), torch.eye(3).to_sparse()], ids=["meta", "sparse"])
def test_a_tensor_without_plain_content_is_refused(t):
    with pytest.raises(TypeError, match="no plain content"):
        digest(t)


def test_a_fake_tensor_is_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = torch.empty(3)
    with pytest.raises(TypeError, match="FakeTensor"), mode:
        digest(fake)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_tensor_on_cuda_has_the_digest_of_its_copy(dtype):
    t = noise(3, CHUNK // 2 + 1, dtype=dtype)
    assert cast_digests(t.cuda()) == cast_digests(t)
    assert digest(t.cuda().T) == digest(t.T)
    with torch.cuda.stream(torch.cuda.Stream()):  # the content is not there yet when digest is called
        late = torch.zeros(t.shape, dtype=dtype, device="cuda")
        torch.cuda._sleep(100_000_000)
        late.copy_(t.cuda())
        assert digest(late) == digest(t)


def test_a_storage_can_be_resized_after_it_was_digested():
    """As FSDP does with weights between two calls."""
    t = torch.randn(64, 64)
    digest(t)
    t.untyped_storage().resize_(0)
    assert t.untyped_storage().nbytes() == 0
