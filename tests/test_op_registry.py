"""Registration of GPU kernels, with the CPU in the part of the GPU."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from mobilellm_fast import op_cuda, op_registry

ran = []  # stems whose hand-written derivative ran


def cube_times(x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
    return x**3 * y * factor


def triple_times(x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
    return x**3 * y * factor


def cube_backward(grad: Tensor, x: Tensor, y: Tensor, factor: float) -> Tensor:
    ran.append("cube_times")
    return 3 * grad * x**2 * y * factor


def saving(x: Tensor, y: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    return x**3 * y * factor, x**2


def saved(x: Tensor, y: Tensor, factor: float = 1.0) -> tuple[Tensor]:
    return (torch.empty_like(x),)


def saved_backward(
    grad: Tensor, x: Tensor, y: Tensor, factor: float, out: Tensor, square: Tensor
) -> tuple[Tensor, Tensor]:
    ran.append("triple_times")
    assert torch.equal(out, x**3 * y * factor)
    return 3 * grad * square * y * factor, grad * square * x * factor


@pytest.fixture(scope="module")
def ops():
    """An op whose backward needs the arguments alone, and one whose backward needs more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op_registry, "GPU", "cpu")
        patch.setattr(op_cuda, "HAS_TRITON", True)
        plain = op_registry.register(
            cube_times,
            check=lambda *args, **options: None,
            cuda=cube_times,
            cuda_backward=cube_backward,
        )
        saves = op_registry.register(
            triple_times,
            check=lambda *args, **options: None,
            cuda=triple_times,
            cuda_saving=saving,
            cuda_backward=saved_backward,
            fake_saved=saved,
        )
        yield {"cube_times": plain, "triple_times": saves}


def arguments(dtype=torch.float32, wanted=(True, True)):
    torch.manual_seed(0)
    return [torch.randn(3, 4, dtype=dtype).requires_grad_(grad) for grad in wanted]


class Recorder(TorchDispatchMode):
    """Notes the names of our operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mobilellm_fast":
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def gradients(op, args, **options):
    """Return gradients and the names of the operators that computed them."""
    with Recorder() as recorder:
        out = op(*args, factor=2.0)
        wanted = [t for t in args if t.requires_grad]
        found = torch.autograd.grad(out, wanted, torch.ones_like(out), **options)
    want = torch.autograd.grad(cube_times(*args, 2.0), wanted, torch.ones_like(out))
    torch.testing.assert_close(found, want)
    return found, recorder.names


@pytest.mark.parametrize(
    ("stem", "wanted", "names"),
    [
        ("cube_times", (True, False), ["cube_times", "cube_times_backward"]),
        # the kernel has no gradient of the second argument
        ("cube_times", (True, True), ["cube_times"]),
        ("triple_times", (True, True), ["triple_times_saving", "triple_times_backward"]),
        ("triple_times", (False, True), ["triple_times_saving", "triple_times_backward"]),
    ],
)
def test_the_kernels_run_where_they_fit(ops, stem, wanted, names):
    assert gradients(ops[stem], arguments(wanted=wanted))[1] == names


@pytest.mark.parametrize("stem", ["cube_times", "triple_times"])
def test_what_they_do_not_take_is_left_to_the_reference(ops, stem):
    args = arguments(torch.float64, wanted=(True, False))
    assert gradients(ops[stem], args)[1] == [stem]


@pytest.mark.parametrize("stem", ["cube_times", "triple_times"])
def test_gradients_of_gradients_come_from_the_reference(ops, stem):
    args = arguments()
    found, names = gradients(ops[stem], args, create_graph=True)
    assert f"{stem}_backward" not in names
    (second,) = torch.autograd.grad(found[0].sum(), args[0])
    torch.testing.assert_close(second, 12 * args[0] * args[1])


def test_inference_saves_nothing(ops):
    with Recorder() as recorder, torch.no_grad():
        ops["triple_times"](*arguments())
    assert recorder.names == ["triple_times"]


@pytest.mark.parametrize("stem", ["cube_times", "triple_times"])
def test_opcheck(ops, stem):
    args = arguments(wanted=(True, False))
    opcheck(getattr(torch.ops.mobilellm_fast, stem).default, args)
    if stem == "triple_times":  # called below autograd alone
        plain = [t.detach() for t in args]
        opcheck(torch.ops.mobilellm_fast.triple_times_saving.default, plain)


@pytest.mark.parametrize("stem", ["cube_times", "triple_times"])
def test_compiled(ops, stem):
    x, y = arguments(wanted=(True, False))
    compiled = torch.compile(ops[stem], backend="aot_eager", fullgraph=True)
    ran.clear()
    (got,) = torch.autograd.grad(compiled(x, y).sum(), x)
    assert ran == [stem]
    torch.testing.assert_close(got, 3 * x**2 * y)


@pytest.mark.parametrize("stem", ["cube_times", "triple_times"])
def test_transforms_of_functions_see_through_kernels(ops, stem):
    x, y = arguments(wanted=(False, False))
    want = 3 * x**2 * y
    found = torch.func.grad(lambda t: ops[stem](t, y).sum())(x)
    torch.testing.assert_close(found, want)
    _, tangent = torch.func.jvp(lambda t: ops[stem].by_gpu_kernel(t, y), (x,), (x,))
    torch.testing.assert_close(tangent, want * x)
    with forward_ad.dual_level():
        dual = ops[stem].by_gpu_kernel(forward_ad.make_dual(x.requires_grad_(), x.detach()), y)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, want * x)
        (gradient,) = torch.autograd.grad(dual.sum(), x)
        torch.testing.assert_close(forward_ad.unpack_dual(gradient).primal, want)
