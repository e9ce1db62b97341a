"""Opens a checkpoint and reads its tensors one by one, so that no more than one is in memory at a time."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch

from .headers import BrokenFileError, FileInfo, TensorInfo, describe_file, load_torch, unwrap
from .kinds import WrongFileError


class TensorSource:
    """Tensors of an open checkpoint by the model's own names (the file's prefix taken off).

    Iterating gives names in the order they lie in the file, which is the quickest order to read them.
    Use it in a ``with`` statement, or close it.
    """

    def __init__(self, info: FileInfo) -> None:
        self.info = info
        self.tensors: dict[str, TensorInfo] = info.model_tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def read(self, name: str) -> torch.Tensor:
        """One tensor as it is in the file, on the CPU, in memory of its own. KeyError for an unknown name."""
        raise NotImplementedError

    def map(self, name: str) -> torch.Tensor:
        """One tensor as it is in the file, on the CPU, in the file's own pages where the system can map them.

        They are its cache: it fills them when they are looked at, and takes them back when memory is short. Also after
        ``close``, and for as long as the file stays as it is. What is written to the tensor does not reach the file.
        """
        return self.read(name)

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> TensorSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SafetensorsSource(TensorSource):
    """Reads with plain file access: of what is converted or copied to a device, a mapped file's pages would count as
    the process's memory for nothing, and mapping is slow or refused on network and WSL drives. What stays on the CPU
    as it is can be mapped, which saves the copy."""

    def __init__(self, info: FileInfo) -> None:
        super().__init__(info)
        self._file = info.path.open("rb", buffering=0)
        self._pages: mmap.mmap | None = None
        self._mappable = True

    def read(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        dtype = tensor.torch_dtype
        if dtype is None:
            raise WrongFileError(f"{self.info.path.name}: the tensor {name} is of type {tensor.dtype}, unknown here.")
        if not tensor.nbytes:
            return torch.empty(tensor.shape, dtype=dtype)
        buffer = bytearray(tensor.nbytes)
        self._file.seek(tensor.offset)
        view, done = memoryview(buffer), 0
        while done < tensor.nbytes:
            count = self._file.readinto(view[done:])
            if not count:
                raise WrongFileError(f"{self.info.path.name} ended within the tensor {name}: download it again.")
            done += count
        return torch.frombuffer(buffer, dtype=dtype).reshape(tensor.shape)

    def map(self, name: str) -> torch.Tensor:
        tensor, pages = self.tensors[name], self._map_file()
        dtype = tensor.torch_dtype
        if pages is None or dtype is None or not tensor.nbytes or tensor.offset % dtype.itemsize:
            return self.read(name)
        return torch.frombuffer(pages, dtype=dtype, count=tensor.numel, offset=tensor.offset).reshape(tensor.shape)

    def _map_file(self) -> mmap.mmap | None:
        """The file's pages, kept by the tensors made of them; None where the drive cannot be mapped."""
        if self._pages is None and self._mappable:
            try:
                self._pages = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError):
                self._mappable = False
        return self._pages

    def close(self) -> None:
        self._file.close()
        self._pages = None


class TorchSource(TensorSource):
    """A torch file through ``weights_only``. A zipped one is mapped: its pages are the system's cache, which
    it takes back when memory is short. One of before torch 1.6 has to be held in memory whole."""

    def __init__(self, info: FileInfo) -> None:
        super().__init__(info)
        with info.path.open("rb") as file:
            zipped = file.read(2) == b"PK"
        self._tensors: dict[str, Any] = unwrap(load_torch(info.path, map_location="cpu", zipped=zipped))[0]

    def read(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise KeyError(name)
        return self._tensors[self.info.prefix + name].detach().clone(memory_format=torch.contiguous_format)

    def map(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise KeyError(name)
        return self._tensors[self.info.prefix + name].detach().contiguous()

    def close(self) -> None:
        self._tensors = {}


def open_checkpoint(path: str | os.PathLike | FileInfo) -> TensorSource:
    """Opens a model file of any kind for reading tensor by tensor.

    Takes a path, or what ``describe_file`` said of it. Raises FileNotFoundError, or WrongFileError where
    the file is no readable model.
    """
    info = path if isinstance(path, FileInfo) else describe_file(path)
    if not info.is_readable:
        raise WrongFileError(f"{info.path.name} is {info.what}: no tensors can be read from it.")
    try:
        return SafetensorsSource(info) if info.format == "safetensors" else TorchSource(info)
    except BrokenFileError as error:
        raise WrongFileError(f"{info.path.name} could not be read {error.detail}.") from error
