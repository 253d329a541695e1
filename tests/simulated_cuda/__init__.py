"""A CUDA device that is not there, so that code for CUDA runs where there is none.

    python -m pytest -p tests.simulated_cuda.plugin tests/engine/test_overlap_gpu.py
    python -m tests.simulated_cuda script.py      # or -m module, with arguments
    PYTHONPATH=tests/simulated_cuda/every_process:. ...     # and the processes that it starts

On a CPU build of PyTorch tensors say `cuda:0`, and memory and arithmetic are the host's. What a
device refuses is refused: tensors on two devices, generators of another device, a wait for the
device inside a capture or under `torch.cuda.set_sync_debug_mode("error")`, more memory than there
is. Fresh memory holds garbage, memory is accounted for each process, other processes can map it,
pinned memory is told apart, a captured graph runs nothing before its replay. torch.distributed has
the backend nccl (gloo on the same memory), PyTorch's varlen attention is there in plain PyTorch (a
package `flash_attn` too, for a test that asks for it), and Triton's kernels run in its interpreter.

Streams run in the order of their calls, so a missing wait does not show. CUDA C++ kernels,
torch.compile and speeds do not exist here.

    SIMULATED_CUDA_DEVICES=2      how many devices
"""
