"""What a student is told besides the labels: losses between its logits and a teacher's, both N x classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def kl_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Hinton, Vinyals and Dean 2015 (arXiv:1503.02531): KL divergence of softened predictions, times temperature squared.

    The square keeps the gradient's size the same whatever the temperature.
    """
    import torch.nn.functional as F

    soft, wanted = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    return F.kl_div(soft, wanted, reduction="batchmean", log_target=True) * temperature**2


def dist_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Huang et al. 2022 (arXiv:2205.10536): 1 - correlation, for each image over the classes and for each class over the images.

    It asks for the teacher's ranking, not for its numbers, which suits a student much weaker than its teacher.
    """
    import torch.nn.functional as F

    p, q = F.softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    return (_apart(p, q) + _apart(p.t(), q.t())) * temperature**2


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the rows of 1 - their Pearson correlation, 0 to 2."""
    import torch.nn.functional as F

    return 1 - F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1).mean()


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Zagoruyko and Komodakis 2017 (arXiv:1612.03928): distance between maps of where a layer looks, N x C x H x W each.

    A map is the mean square over the channels, of length one; so the two layers may have different numbers of channels, and nothing
    has to be learned to compare them. The student's map is brought to the teacher's size where they differ.
    """
    import torch.nn.functional as F

    looks, wanted = student.square().mean(1, keepdim=True), teacher.square().mean(1, keepdim=True)
    if looks.shape[2:] != wanted.shape[2:]:
        looks = F.interpolate(looks, wanted.shape[2:], mode="bilinear", align_corners=False)
    return (F.normalize(looks.flatten(1)) - F.normalize(wanted.flatten(1))).square().sum(1).mean()
