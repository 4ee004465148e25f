"""Which errors are a host's fault."""

import pytest

from mvd.distributed.blame import hardware_fault

NCCL = (
    "NCCL error in: ProcessGroupNCCL.cpp:3384, unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL "
    "version 2.28.3\nncclSystemError: System call (e.g. socket, malloc) or external library call failed or device "
    "error.\nLast error:\n"
)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be ...", "uncorrectable ECC error"),
        ("CUDA error: uncorrectable NVLink error detected during the execution", "NVLink error"),
        ("NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus", "Xid"),
        ("CUDA error: no CUDA-capable device is detected", "no usable GPU"),
        ("No CUDA GPUs are available", "no usable GPU"),
        ("Found no NVIDIA driver on your system. Please check ...", "no usable GPU"),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", "a GPU is busy"),
        ("CUDA error: unspecified launch failure", "a GPU kernel failed without a reason"),
        ("CUDA error: an illegal instruction was encountered", "illegal instruction on a GPU"),
        ("CUDA error: system not yet initialized", "fabric manager"),
        ("CUDA error: unknown error", "CUDA cannot be initialized"),
        (NCCL + "ibv_poll_cq failed: Call to ibv_create_qp failed", "InfiniBand error"),
        ("NCCL WARN NET/IB : Got completion from peer 10.0.0.2<4791> with status=4 opcode=0", "InfiniBand error"),
        ("NET/IB : Got completion from peer 10.0.0.2<4791> with status=IBV_WC_LOC_PROT_ERR(4)", "InfiniBand error"),
        ("NCCL WARN NET/IB : mlx5_0:1 Got async event : port error", "InfiniBand error"),
        (NCCL + "Error while creating shared memory segment /dev/shm/nccl-x (size 9637888)", "system error in NCCL"),
        ("Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000", "only one GPU"),
        ("DataLoader worker (pid 7) is killed by signal: Illegal instruction. ", "SIGILL"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...", "SIGBUS"),
    ],
)
def test_a_hardware_error_is_the_hosts_fault(text, fault):
    assert fault in hardware_fault(text) and fault in hardware_fault(RuntimeError(text))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: device-side assert triggered",
        "CUDA error: an illegal memory access was encountered",
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB",
        "mat1 and mat2 shapes cannot be multiplied (8x3 and 4x4)",
        "DataLoader worker (pid 7) is killed by signal: Segmentation fault. ",
        NCCL + "socketStartConnect: Connect to 10.0.0.2<42123> failed : Connection refused",
        "NCCL error in: ProcessGroupNCCL.cpp, remote process exited or there was a network error\nLast error:\n"
        "NET/Socket: Connection closed by remote peer node2<41234>",
        "NCCL error in: ProcessGroupNCCL.cpp, remote process exited or there was a network error, NCCL version 2.28.3\n"
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
        "Last error:\nNET/IB: Got completion from peer 10.0.0.2<41234> with status=IBV_WC_RETRY_EXC_ERR(12) opcode=0",
        "NET/IB : Got completion from peer 10.0.0.2<41234> with status=12 opcode=32762 len=0 vendor err 129 (Recv)",
        "NET/IB : Got completion from peer 10.0.0.2<41234> with status=5 opcode=0 len=0 vendor err 244",
        "NCCL WARN NET/IB : mlx5_0:1 Got async event : GID table change",
        NCCL + "Call to ibv_modify_qp failed with 110 Connection timed out, on dev mlx5_0:1",
        NCCL + "Call to ibv_modify_qp failed with 113 No route to host, on dev mlx5_0:1",
        "",
    ],
)
def test_a_bug_or_a_lost_peer_is_no_hosts_fault(text):
    assert hardware_fault(text) is None and hardware_fault(RuntimeError(text)) is None


def test_an_error_that_follows_from_a_hardware_error_is_one_too():
    try:
        try:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        finally:
            raise ValueError("closing failed")
    except ValueError as error:
        assert hardware_fault(error) == "uncorrectable ECC error of a GPU's memory"


def test_only_errors_of_the_runtime_count():
    assert hardware_fault(ValueError("the data set Xid has no NVLink")) is None
