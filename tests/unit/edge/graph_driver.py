"""Runs exported graphs with onnxruntime alone, in the plainest way: shares nothing with our runtime."""

import numpy as np
import onnxruntime


def session(path, **options):
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3  # it warns of every optional input
    for name, chosen in options.items():
        setattr(settings, name, chosen)
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


class InPlace:
    """A decoder whose past and present are the same buffers."""

    def __init__(self, path, capacity, batch=1, given=None, **options):
        self.session = session(path, **options)
        pasts = [put for put in self.session.get_inputs() if put.name.startswith("past.")]
        shapes = {put.name: (batch, put.shape[1], capacity, put.shape[3]) for put in pasts}
        # Whatever stands beyond the valid positions must not matter.
        self.cache = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.full(shape, 7.5, np.float32)) for name, shape in shapes.items()
        }
        self.given = given or {}

    def __call__(self, ids, before, kept=None):
        """Logits for new tokens ``(batch, sequence)``, ``before`` valid tokens in each row."""
        ids = np.asarray(ids, np.int64)
        before = np.broadcast_to(before, len(ids))
        return self.run(ids, before[:, None] + np.arange(ids.shape[1]), before + ids.shape[1], kept)

    def run(self, ids, positions, valid, kept=None):
        """``valid`` tokens per row after the call."""
        kept = np.arange(ids.shape[1]) if kept is None else np.asarray(kept)
        binding = self.session.io_binding()
        plain = {
            "input_ids": ids,
            "position_ids": positions,
            "logits_positions": kept,
            "seqlens_k": np.asarray(valid) - 1,
            "total_sequence_length": np.array(np.max(valid)),
        }
        for name, value in plain.items():
            dtype = np.int32 if name in ("seqlens_k", "total_sequence_length") else np.int64
            binding.bind_cpu_input(name, np.ascontiguousarray(value, dtype=dtype).reshape(np.shape(value)))
        for name, value in self.given.items():
            # (an optional input cannot be bound as a numpy array)
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        for name, buffer in self.cache.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past", "present"), buffer)
        binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()


def greedy(model, ids, count):
    """Token ids that follow, and the logits that each came of."""
    logits = model([ids], 0)[0]
    shown, answer = [logits[-1]], []
    for step in range(count):
        answer.append(int(shown[-1].argmax()))
        shown.append(model([[answer[-1]]], len(ids) + step)[0, 0])
    return logits, answer, shown[1:]
