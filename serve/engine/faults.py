"""What went wrong in a step, and what its requests may read about it. Called by engine.py."""

from __future__ import annotations

from serve.errors import EngineFailed, OutOfMemory, ServeError


def is_out_of_memory(error: BaseException) -> bool:
    """torch raises OutOfMemoryError on a GPU, and a RuntimeError naming its allocator on a CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


def public(error: BaseException) -> ServeError:
    """What a caller may read about it; the rest is in the log."""
    if isinstance(error, ServeError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory(
            "The model ran out of memory on this request. Try a shorter one.", retry_after=5
        )
    return EngineFailed("The model failed on this request. The server's log has the details.")
