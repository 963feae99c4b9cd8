"""Wrong numbers on one rank: a poisoned loss, activation or gradient, a flipped bit."""

import torch


def bits(run):
    return [piece.tensor.clone() for piece in run.pieces()] + [
        parameter.detach().clone() for chunk in run.engine.chunks for parameter in chunk.parameters()
    ]


def poison(run, where, value):
    """Make one thing on this rank `value` in every pass until the returned handle is removed."""
    layers = [layer for chunk in run.engine.chunks for layer in chunk.module.decoder.layers]
    if where == "activation":
        return layers[-1].mlp.linear_fc2.register_forward_hook(lambda module, args, out: (out[0] * value, *out[1:]))
    if where == "gradient":
        weight = layers[-1].self_attention.linear_proj.weight
        return weight.register_hook(lambda gradient: gradient * value)
    return Loss(run, lambda batch: True, value)


class Loss:
    """Multiplies the loss of some micro-batches where the last stage computes it."""

    def __init__(self, run, chosen, value):
        self._run, self._forward = run, run.engine.forward
        run.engine.forward = lambda batches, model: self._poisoned(batches, model, chosen, value)

    def _poisoned(self, batches, model, chosen, value):
        batch = next(batches)
        output, loss_of = self._forward(iter([batch]), model)

        def loss(out):
            total, tokens, report = loss_of(out)
            scale = value if chosen(batch) else 1.0
            return total * scale, tokens, {"sums": report["sums"] * torch.tensor([scale, 1.0], dtype=torch.float64)}

        return output, loss

    def remove(self):
        self._run.engine.forward = self._forward


def flip(tensor, element, bit):
    """Change one bit of one element."""
    width = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    words = tensor.detach().view(-1).view(width)
    # shifted in Python: the sign bit of a word is no positive number of its width
    mask = (1 << bit) - (1 << 8 * tensor.element_size() if bit == 8 * tensor.element_size() - 1 else 0)
    words[element] ^= mask
