"""The settings that torchattacks' attacks have as methods, under torchattacks' names and with its meaning."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from cmr_fast._files import as_path, check_regular, write_aside
from cmr_fast.attacks.victim import Victim, check_channels, per_channel
from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import described

TargetMap = Callable[[Tensor, Tensor], Tensor]


class Habits:
    """What an attack is told after it was made. Set these before the calls, not beside them from another thread."""

    supported_mode: tuple[str, ...] = ("default",)
    attack_mode = "default"
    check: bool
    victim: Victim

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self.normalization_used: dict[str, Tensor] | None = None

    def set_normalization_used(self, mean: Any, std: Any) -> None:
        """Say that the inputs are normalised: x = (pixels - mean) / std.

        Parameters
        ----------
        mean, std
            A value a channel. bounds and eps stay in pixels; what is returned is normalised as x is.

        Raises
        ------
        InputError
            For a std that is not above 0, and values that are no numbers.
        """
        self.victim.normalize = per_channel((mean, std))
        mean, std = self.victim.normalize
        shape = (1, -1, 1, 1)
        self.normalization_used = {"mean": mean.float().reshape(shape), "std": std.float().reshape(shape)}

    def set_device(self, device: torch.device | str) -> None:
        """Move inputs to this device before they are attacked; what is returned lies there too.

        Parameters
        ----------
        device
            'cpu', 'cuda:0', ...

        Raises
        ------
        InputError
            For what is no device.
        """
        try:
            self.device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise InputError(f"device must be one of torch's, like 'cpu' or 'cuda:0', got {device!r}") from error

    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        """Attack the model in training mode, its batch normalisation and dropout in evaluation mode unless asked for.

        cuDNN's recurrent networks have a gradient in training mode only. Modes, running statistics and the rest of the
        model are put back after every call.

        Parameters
        ----------
        model_training, batchnorm_training, dropout_training
            Which parts are in training mode.
        """
        self.victim.training = (model_training, batchnorm_training, dropout_training)
        if model_training and (batchnorm_training or dropout_training):
            self.check = False  # asked for: a model that is random, or mixes its batch

    def get_mode(self) -> str:
        """The mode: "default", "targeted(label)", "targeted(random)", "targeted(least-likely)", "targeted(custom)"."""
        return self.attack_mode

    def set_mode_default(self) -> None:
        """Untargeted: away from the labels."""
        self._set_mode("default", False)

    def set_mode_targeted_by_label(self, quiet: bool = False) -> None:
        """Labels are the classes to reach.

        Parameters
        ----------
        quiet
            As of torchattacks; nothing is printed anyway.

        Raises
        ------
        InputError
            For an attack or a loss that has no targets.
        """
        self._set_mode("targeted(label)", "label")

    def set_mode_targeted_random(self, quiet: bool = False) -> None:
        """Each sample towards a random class other than its label.

        Parameters
        ----------
        quiet
            As of torchattacks; nothing is printed anyway.

        Raises
        ------
        InputError
            For an attack or a loss that has no targets.
        """
        self._set_mode("targeted(random)", "random")

    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:
        """Each sample towards the class that the model gives the kth lowest score, the label left out.

        Parameters
        ----------
        kth_min
            1 is the least likely class.
        quiet
            As of torchattacks; nothing is printed anyway.

        Raises
        ------
        InputError
            For a kth_min below 1; where it is above the number of wrong classes, at the call.
        """
        if not isinstance(kth_min, int) or kth_min < 1:
            raise InputError(f"kth_min must be an integer of 1 or more, got {kth_min!r}")
        self._set_mode("targeted(least-likely)", kth_min)

    def set_mode_targeted_by_function(self, target_map_function: TargetMap, quiet: bool = False) -> None:
        """Each sample towards target_map_function(inputs, labels), int (B,).

        Parameters
        ----------
        target_map_function
            (inputs, labels) -> int (B,).
        quiet
            As of torchattacks; nothing is printed anyway.

        Raises
        ------
        InputError
            For what is no function, and an attack or a loss that has no targets.
        """
        if not callable(target_map_function):
            raise InputError(f"target_map_function must be a function (inputs, labels), got {target_map_function!r}")
        self._set_mode("targeted(custom)", target_map_function)

    def _set_mode(self, mode: str, targeted: Any) -> None:
        if mode != "default" and "targeted" not in self.supported_mode:
            raise InputError(f"{type(self).__name__} has no targeted mode; PGD, FGSM, MIFGSM and CW have")
        self.attack_mode = mode

    def _to_pixels(self, x: Tensor) -> Tensor:
        """Pixels of inputs that set_normalization_used calls normalised; what rounding put outside is put back."""
        if self.normalization_used is None:
            return x
        if self.victim.normalize is not None:
            check_channels(self.victim.normalize, x)
        mean, std = (v.to(x).reshape(1, -1, *[1] * (x.ndim - 2)) for v in self.normalization_used.values())
        pixels = x * std + mean
        low, high = (torch.as_tensor(v, dtype=x.dtype, device=x.device) for v in self.bounds)  # type: ignore[attr-defined]
        low, high = (v if v.ndim < 2 else v.reshape(*v.shape, 1, 1) for v in (low, high))
        boxed = torch.minimum(torch.maximum(pixels, low), high)
        rounding = max(1e-5, 4 * torch.finfo(x.dtype).eps)
        return torch.where((boxed - pixels).abs() <= rounding * (high - low), boxed, pixels)

    def _from_pixels(self, x: Tensor) -> Tensor:
        if self.normalization_used is None:
            return x
        mean, std = (v.to(x).reshape(1, -1, *[1] * (x.ndim - 2)) for v in self.normalization_used.values())
        return (x - mean) / std

    def save(
        self,
        data_loader: Iterable[Any],
        save_path: str | Path | None = None,
        verbose: bool = True,
        return_verbose: bool = False,
        save_predictions: bool = False,
        save_clean_inputs: bool = False,
        save_type: str = "float",
    ) -> tuple[float, float, float] | None:
        """Attack all batches of a loader, and write what was made of them as torchattacks does.

        Parameters
        ----------
        data_loader
            Batches (inputs, labels), tensors or numpy arrays.
        save_path
            A torch file of a dict: adv_inputs (N, ...), labels (N,), save_type; preds, clean_inputs where asked for.
            Pixels, also where inputs are normalised. None: nothing is written.
        verbose
            Print a line about all of it at the end.
        return_verbose
            Return robust accuracy in per cent, mean L2 distance of the samples that fool the model, in the units of
            the inputs, and seconds.
        save_type
            "float", or "int": uint8 from 0 to 255.

        Raises
        ------
        InputError
            Before any work, for a path that cannot be written and an unknown save_type; for a data_loader of anything
            else than such batches.
        """
        import time

        if save_type not in ("float", "int"):
            raise InputError(f"save_type must be 'float' or 'int', got {save_type!r}")
        path = None if save_path is None else as_path(save_path, "save_path")
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise InputError(f"{path}: expected the name of a file in a folder that exists")
        if not isinstance(data_loader, Iterable):
            raise InputError(f"data_loader must yield batches (inputs, labels), got {type(data_loader).__name__}")
        began = time.perf_counter()
        parts: dict[str, list[Tensor]] = {"adv_inputs": [], "labels": [], "preds": [], "clean_inputs": []}
        distances = []
        for batch in data_loader:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                of = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
                raise InputError(f"data_loader must yield batches (inputs, labels), got a {type(batch).__name__}{of}")
            inputs, labels, _ = self.checked(*batch)  # type: ignore[attr-defined]
            adv: Tensor = self(inputs, labels)  # type: ignore[operator]
            delta, clean, adv = (adv - inputs).cpu(), self._to_pixels(inputs), self._to_pixels(adv)
            with self.victim.prepare(adv) as victim:
                preds = victim.scores(adv).argmax(dim=1).cpu()
            wrong = preds != labels.cpu()
            distances.append(delta.flatten(1)[wrong].norm(dim=1))
            for name, value in zip(parts, (adv, labels, preds, clean), strict=True):
                parts[name].append(value.detach().cpu())
        if not distances:
            raise InputError("data_loader must have at least one batch, got none")
        whole = {name: torch.cat(values) for name, values in parts.items()}
        accuracy = 100 * float((whole["preds"] == whole["labels"]).double().mean())
        distance, seconds = float(torch.cat(distances).mean()), time.perf_counter() - began
        if path is not None:
            left_out = [] if save_predictions else ["preds"]
            left_out += [] if save_clean_inputs else ["clean_inputs"]
            kept: dict[str, Any] = {name: value for name, value in whole.items() if name not in left_out}
            if save_type == "int":
                for name in {"adv_inputs", "clean_inputs"} & set(kept):
                    kept[name] = (kept[name] * 255).to(torch.uint8)
            with write_aside(path) as aside:
                torch.save({**kept, "save_type": save_type}, aside)
        if verbose:
            print(f"Robust accuracy: {accuracy:.2f} % / L2: {distance:.5f} ({seconds:.3f} s)")
        return (accuracy, distance, seconds) if return_verbose else None

    @staticmethod
    def load(
        load_path: str | Path,
        batch_size: int = 128,
        shuffle: bool = False,
        normalize: dict[str, Any] | None = None,
        load_predictions: bool = False,
        load_clean_inputs: bool = False,
    ) -> DataLoader[tuple[Tensor, ...]]:
        """What `save` has written, ours or torchattacks'.

        Parameters
        ----------
        load_path
            The file.
        batch_size, shuffle
            Of the loader.
        normalize
            {"mean": ..., "std": ...}, a value a channel each, applied to the pixels.
        load_predictions, load_clean_inputs
            Add `preds` and `clean_inputs` to the batches.

        Returns
        -------
        DataLoader
            Batches (adv_inputs, labels, ...), pixels as floats.

        Raises
        ------
        InputError
            For a file that does not hold them, and a normalize that is no such dict or has other channels.
        """
        path = as_path(load_path, "load_path")
        check_regular(path, "saved attack")
        scale = None if normalize is None else _mean_and_std(normalize)
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # torch raises whatever its unpickler stumbles over; its own advice is unsafe
            raise InputError(
                f"{path}: expected what save has written, tensors in a dict; it is no file of torch.save, is damaged, "
                "or holds something else than plain data, which is not run"
            ) from error
        names = ["adv_inputs", "labels", *["preds"] * load_predictions, *["clean_inputs"] * load_clean_inputs]
        if not isinstance(stored, dict) or (missing := [name for name in names if name not in stored]):
            seen = f"no {missing[0]}" if isinstance(stored, dict) else f"a {type(stored).__name__}"
            raise InputError(f"{path}: expected {', '.join(names)}, got {seen}")
        count = None
        for name in names:
            x = stored[name]
            if not isinstance(x, Tensor) or x.ndim == 0 or x.layout != torch.strided:
                raise InputError(f"{path}: {name} must be a dense tensor with a row a sample, got {described(x)}")
            count = len(x) if count is None else count
            if len(x) != count:
                raise InputError(f"{path}: {name} must have a row for each of {count} adv_inputs, got {len(x)}")
        for name in [name for name in names if name.endswith("inputs")]:
            x = stored[name].float() / (255 if stored[name].dtype == torch.uint8 else 1)
            if scale is not None:
                check_channels(scale, x, f"{path}: {name}")
                mean, std = (v.to(x).reshape(1, -1, *[1] * (x.ndim - 2)) for v in scale)
                x = (x - mean) / std
            stored[name] = x
        return DataLoader(TensorDataset(*(stored[name] for name in names)), batch_size, shuffle=shuffle)

    def __repr__(self) -> str:
        shown = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in ("victim", "seen")}
        shown["attack_mode"], shown["normalization_used"] = self.attack_mode, self.normalization_used is not None
        model = type(self.victim.model).__name__
        values = ", ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in shown.items())
        return f"{type(self).__name__}(model={model}, {values})"


def _mean_and_std(normalize: object) -> tuple[Tensor, Tensor]:
    if not isinstance(normalize, dict) or not {"mean", "std"} <= normalize.keys():
        seen = f"keys {list(normalize)}" if isinstance(normalize, dict) else type(normalize).__name__
        raise InputError(f'normalize must be {{"mean": ..., "std": ...}}, got {seen}')
    return per_channel((normalize["mean"], normalize["std"]))
