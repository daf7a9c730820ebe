# SPDX-License-Identifier: MIT
"""Robust Cross-Modal Knowledge Distillation for Unconstrained Videos, in one file.

Paper: Xia, Li, Deng, Xiong, Dou, Hu, 2023, https://arxiv.org/abs/2304.07775

Vision and sound of one clip are often taken to mean the same. In unconstrained videos they do not: a modality carries
irrelevant noise, and pairs of clips correlate to different degrees. The Modality Noise Filter (MNF) cleans the teacher
modality with cross-modal context; Contrastive Semantic Calibration (CSC) distils it into a student of one modality.

    python xmkd.py                                              # demo: student alone against the distilled student
    python xmkd.py --task audio_tagging --data ./audioset       # the real thing; also ucf101, or train/<label>/* folders

Measured: the demo on two CPU cores in 219 s (torch 2.14.1, seed 3): teacher mAP 0.66, student on the labels alone 0.88,
distilled 0.84. Its pictures with a noisy teacher and twice the steps (seeds 3 to 5): top-1 0.82 by labels alone, 0.90
by CSC, 0.79 by MNF + CSC. README has the rest; the paper's data sets and a GPU have not been at hand.

The algorithm, numbered as in `train_step`; the teacher is frozen, one embedding a clip:
    1. student   map S, pooled p, logits       = student(view)
    2. filter    gate g = sigmoid(W2 relu(BN(W1 [t ; mean S]))),  purified teacher t^ = g * t
                 evidence s^ = relu(BN(W3 attention(query t^, keys and values S))),  y^ = W4 s^
    3. trust     similarity_ij = cos(p_i, t^_j), a constant
    4. L_filter  = CE(y^, y) + sparsity(W2) + triplet(p, t, t^)                  trains the filter only
    5. L_student = CE(logits, y) + CSC(p, s^, temperature = similarity + offset)  trains student and filter
    6. Adam: student at lr, filter at 0.2 lr

Sections: 1 Method, 2 Methods compared with, 3 Networks, 4 Media, 5 Data sets, 6 Demo data, 7 Clip store and views,
8 Metrics, 9 Training, 10 Teacher, 11 Predicting and explaining, 12 Run support, 13 Arguments and main.
Letters: B clips in a batch, K positions of a map, D features, C classes, T frames, N clips.
"""
from __future__ import annotations

import argparse
import csv
import fcntl
import gc
import gzip
import hashlib
import itertools
import json
import math
import os
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import textwrap
import time
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio
from av.video.reformatter import Colorspace, VideoReformatter
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.video import R2Plus1D_18_Weights, r2plus1d_18
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.utils import draw_bounding_boxes, make_grid, save_image

__version__ = "0.4.0"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))        # of processes, set by torchrun

class InputError(ValueError):
    """Input that its owner can mend: a file, a list, an option. `main` prints it as one line and exits with 2."""

# ============================================== 1. Method (step numbers are the title page's)
def cosine_matrix(a: Tensor, b: Tensor) -> Tensor:
    """Step 3. Cosine of every pair of rows: (N, D), (M, D) -> (N, M) in [-1, 1]; a row of zeros gives 0."""
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T

def label_overlap(labels: Tensor) -> Tensor:
    """Step 5. How much two clips count as positives of each other: (B, B) in [0, 1], diagonal 1.

    labels  (B,) class indices: 1 where equal (authors' code), or
            (B, C) multi-hot tags: Jaccard index |y_i and y_j| / |y_i or y_j| (ours; two clips without tags give 1).
    """
    if labels.ndim == 1:
        return (labels[:, None] == labels[None, :]).float()
    tags = labels if labels.is_floating_point() else labels.float()
    shared, size = tags @ tags.T, tags.square().sum(1)                        # (B, B) tags in common; squares: for mixup
    union = size[:, None] + size[None, :] - shared
    return torch.where(union > 0, shared / union.clamp_min(1e-9), 1.0)

def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Steps 4, 5. Cross-entropy of logits (B, C), mean over clips in nats; of multi-hot tags (B, C) summed binary ones.

    The sum is ours: a mean over tags shrinks with C until CSC drowns it (demo: mAP 0.17 by mean, 0.86 by sum).
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum") / len(logits)

def csc_loss(student: Tensor, evidence: Tensor, similarity: Tensor, labels: Tensor, offset: float = 0.07) -> Tensor:
    """Step 5. Contrastive Semantic Calibration: one temperature per pair. Authors' loss/csc_loss.py.

    student     (B, D)  pooled student embedding p, any scale (normalised here)
    evidence    (B, D)  student evidence s^ that the purified teacher points at, any scale
    similarity  (B, B)  cosine in [-1, 1], row = student, column = purified teacher; detached. Zeros: no calibration
    labels      (B,) class indices or (B, C) multi-hot tags, see `label_overlap`
    offset      added to the similarity to make the temperature; 0.07 UCF51, 0.2 ActivityNet
    returns     ()      batch mean in nats; log(B) when all embeddings and all similarities are equal
    Raises ValueError if `similarity` carries a gradient or `offset` is not positive.
    Agreeing pairs are softened, others sharpened. The 1e-10 caps each term near 23 nats; it is 0 in float16.
    """
    if similarity.requires_grad:
        raise ValueError("similarity sets the temperature and must not be trained through; pass similarity.detach()")
    if not offset > 0:
        raise ValueError(f"offset is {offset}, but the temperature must stay above 0; pass an offset > 0, such as 0.07")
    temperature = similarity.clamp_min(0) + offset     # the clamp is ours: no effect on the paper's ReLU embeddings
    nll = -torch.log((cosine_matrix(student, evidence) / temperature).softmax(1) + 1e-10)               # (B, B) nats
    overlap = label_overlap(labels).to(nll.dtype)
    return ((nll * overlap).sum(1) / overlap.sum(1)).mean()

def sparsity_loss(weight: Tensor) -> Tensor:
    """Step 4. Mean over output rows of the L1 norm of a weight (out, in) -> (). Authors' train.py, `norm_loss`."""
    return weight.abs().sum(1).mean()

def triplet_loss(student: Tensor, teacher: Tensor, purified: Tensor, margin: float = 0.2) -> Tensor:
    """Step 4. The purified teacher must be nearer to the student than the raw one, by `margin` in cosine; all (B, D)."""
    raw, clean = F.cosine_similarity(student, teacher), F.cosine_similarity(student, purified)
    return F.relu(raw - clean + margin).mean()

class Filtered(NamedTuple):
    """What the noise filter returns."""
    teacher: Tensor    # (B, D) purified teacher t^
    evidence: Tensor   # (B, D) student evidence s^, non-negative
    logits: Tensor     # (B, C) classes seen in the evidence
    gate: Tensor       # (B, D) openness of each teacher channel, 0..1
    attention: Tensor  # (B, K) where the purified teacher looks on the student's map; rows sum to 1

class ModalityNoiseFilter(nn.Module):
    """Step 2. MNF: gates the teacher by what the student sees, then asks the student's map with it (authors' module).

    num_classes  C
    dim          D, channels of the student's map
    heads        attention heads (authors: 2)
    teacher_dim  width of the teacher's embedding; where it differs from D, a linear adapter comes first (ours)
    Attribute names are those of the released checkpoints, so that they load. Needs batches of at least 2 in train mode.
    """
    def __init__(self, num_classes: int, dim: int = 512, heads: int = 2, teacher_dim: int | None = None) -> None:
        super().__init__()
        self.adapter = nn.Identity() if teacher_dim in (None, dim) else nn.Linear(teacher_dim, dim)
        self.gated_feature_composer = nn.Sequential(nn.Linear(2 * dim, dim // 2), nn.BatchNorm1d(dim // 2), nn.ReLU(),
                                                    nn.Linear(dim // 2, dim))
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.trans_sv = nn.Sequential(nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.ReLU())
        self.sv_cls_classifier = nn.Linear(dim, num_classes)

    def forward(self, teacher: Tensor, student_map: Tensor) -> Filtered:
        """teacher (B, D), student_map (B, K, D) -> Filtered."""
        teacher = self.adapter(teacher)
        context = torch.cat([teacher, student_map.mean(1)], dim=1)                       # (B, 2D)
        gate = self.gated_feature_composer(context).sigmoid()                            # (B, D)
        purified = gate * teacher                                                        # (B, D)
        selected, attention = self.attn(purified[:, None], student_map, student_map)     # (B, 1, D), (B, 1, K)
        evidence = self.trans_sv(selected[:, 0])                                         # (B, D)
        return Filtered(purified, evidence, self.sv_cls_classifier(evidence), gate, attention[:, 0])

class AllReduce(torch.autograd.Function):
    """Sum over all processes of a tensor and, backwards, of its gradient."""
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return AllReduce.apply(gradient.contiguous())

def gather(values: Any) -> Any:
    """Under torchrun all processes' equal parts, joined by rank, with gradient; else the values. Tensors, tuples, None.

    The contrast is what the batch size buys, so CSC sees the whole batch. Each process gets the gradient times their
    number, which DistributedDataParallel divides by it. Ours.
    """
    if values is None or not dist.is_initialized():
        return values
    if isinstance(values, tuple):
        return type(values)(*map(gather, values))
    whole = values.new_zeros(dist.get_world_size(), *values.shape)
    whole[dist.get_rank()] = values
    return AllReduce.apply(whole).flatten(0, 1)

def train_step(student: nn.Module, noise_filter: nn.Module | None, optimizer: torch.optim.Optimizer, inputs: Tensor,
               teacher: Tensor | None, labels: Tensor, offset: float = 0.07, margin: float = 0.2, sparsity: float = 1e-3,
               calibrate: bool = True) -> dict[str, Tensor]:
    """One whole update; returns the detached loss terms as weighted in the sum. Numbers are the title page's.

    inputs (B, ...) for the student, teacher (B, D) embeddings, labels (B,) or (B, C); float32 or float64.
    Under torchrun each process passes its part of the batch and its student in DistributedDataParallel.
    noise_filter  a ModalityNoiseFilter; None: no distillation; or a `Distiller`, whose loss `distill` stands for 2 to 4
    calibrate     False: the temperature of every pair is `offset` (method mnf)
    """
    student.train()
    features, teacher, labels = map(gather, (student(inputs), teacher, labels))                       # 1. student
    student_terms, filter_terms = {"cls": classification_loss(features.logits, labels)}, {}
    if isinstance(noise_filter, ModalityNoiseFilter):
        filtered = noise_filter.train()(teacher, features.map)                                        # 2. filter
        similarity = cosine_matrix(features.pooled, filtered.teacher).detach() * calibrate            # 3. trust (B, B)
        weight: Any = noise_filter.gated_feature_composer[3].weight
        raw = noise_filter.adapter(teacher).detach()
        filter_terms = {"filter_cls": classification_loss(filtered.logits, labels),                   # 4. filter loss
                        "sparsity": sparsity * sparsity_loss(weight),    # of the gate's last layer only, as released
                        "triplet": triplet_loss(features.pooled, raw, filtered.teacher, margin)}
        student_terms["csc"] = csc_loss(features.pooled, filtered.evidence, similarity, labels, offset)   # 5. CSC
    elif noise_filter is not None:
        student_terms["distill"] = noise_filter.train()(features, teacher, labels)
    optimizer.zero_grad(set_to_none=True)
    if noise_filter and filter_terms:     # trains the filter only: what a whole pass gives it, at about half the cost
        torch.stack([*filter_terms.values()]).sum().backward(inputs=[*noise_filter.parameters()], retain_graph=True)
    torch.stack([*student_terms.values()]).sum().backward()
    optimizer.step()                                                                                  # 6. Adam
    return {name: value.detach() for name, value in {**student_terms, **filter_terms}.items()}

def make_optimizer(student: nn.Module, noise_filter: nn.Module | None, lr: float = 3e-4, weight_decay: float = 5e-4,
                   filter_lr: float = 0.2) -> torch.optim.Adam:
    """Step 6. Adam with coupled weight decay; the filter learns at `filter_lr` times the student's rate (authors)."""
    groups: list[dict[str, Any]] = [{"params": list(student.parameters()), "lr": lr}]
    if noise_filter is not None:
        groups.append({"params": list(noise_filter.parameters()), "lr": filter_lr * lr})
    return torch.optim.Adam(groups, weight_decay=weight_decay)

# ============================================== 2. Methods compared with (after their papers; weight 1 each is ours)
def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities (B, C) of classes or, for multi-hot labels, (B, 2C) of each tag's presence and absence."""
    return logits.log_softmax(1) if labels.ndim == 1 else torch.cat([F.logsigmoid(logits), F.logsigmoid(-logits)], 1)

def kd_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 4.0) -> Tensor:
    """Soft targets (Hinton et al. 2015, arXiv 1503.02531): KL of softened predictions (B, C), times temperature ** 2."""
    student, teacher = (log_probabilities(x / temperature, labels) for x in (logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature ** 2

def fitnet_loss(hint: Tensor, teacher: Tensor) -> Tensor:
    """Regression to the teacher's features (Romero et al. 2015, arXiv 1412.6550): both (B, D) -> (); relative to their
    variance, so that their scale does not matter (ours)."""
    return F.mse_loss(hint, teacher) / teacher.var().clamp_min(1e-12)

def crd_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """Contrastive representation distillation (Tian et al. 2020, arXiv 1910.10699): projections (B, 128) -> ().

    A clip's teacher is told from those of clips that share no label with it, in both directions; ours: by a softmax over
    the batch instead of a critic and a memory of the data set.
    """
    rival = label_overlap(labels) == 0
    rival.fill_diagonal_(True)                                            # the clip's own pair stays in the softmax
    logits = (cosine_matrix(student, teacher) / temperature).masked_fill(~rival, -math.inf)
    own = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)

def ccl_loss(features: Features, teacher: Tensor, labels: Tensor, compose: nn.Module, classify: nn.Module,
             temperature: float = 0.5) -> Tensor:
    """Compositional contrastive learning (Chen et al. 2021, arXiv 2104.10955); ours: positives of the NCE term only.

    compose   (B, 2D) -> (B, D): the composition is teacher + compose([teacher ; student]), unit vectors inside
    classify  (B, D) -> (B, C)
    Cross-entropy of the composition, contrast of all three embeddings both ways, half the predictions' symmetric KL.
    """
    def composition(student: Tensor) -> Tensor:
        return teacher + compose(torch.cat([F.normalize(teacher, dim=1), F.normalize(student, dim=1)], 1))
    def contrast(a: Tensor, b: Tensor) -> Tensor:
        constant = a.new_zeros(len(a), len(b))
        return csc_loss(a, b, constant, labels, temperature) + csc_loss(b, a, constant, labels, temperature)
    joint, own = composition(features.pooled), composition(features.pooled.detach())     # own: trains `compose` only
    p, q = log_probabilities(features.logits, labels), log_probabilities(classify(joint), labels)
    symmetric = sum(F.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in ((p, q), (q, p)))
    return (classification_loss(classify(own), labels) + contrast(own, teacher) + contrast(features.pooled, teacher)
            + contrast(features.pooled, joint) + 0.5 * symmetric)

class Distiller(nn.Module):
    """What a method other than MNF learns beside the student: (features, teacher (B, teacher_dim), labels) -> its loss.

    method  "csc" (CSC on the unfiltered teacher: s^ = t^ = t), "kd", "fitnet", "crd" or "ccl"
    probe   kd: a linear layer from embeddings to logits, see `linear_probe`; it stays as it is
    """
    def __init__(self, method: str, num_classes: int, dim: int, teacher_dim: int, offset: float = 0.07,
                 probe: nn.Linear | None = None) -> None:
        super().__init__()
        self.method, self.offset = method, offset
        to_student = nn.Identity() if teacher_dim == dim else nn.Linear(teacher_dim, dim)
        nothing, to_common = nn.Identity(), nn.Linear(teacher_dim, 128)
        self.teacher = {"csc": to_student, "ccl": to_student, "crd": to_common}.get(method, nothing)
        self.student = {"crd": nn.Linear(dim, 128), "fitnet": nn.Linear(dim, teacher_dim),
                        "ccl": nn.Linear(2 * dim, dim)}.get(method, nothing)
        self.classify = probe or (nn.Linear(dim, num_classes) if method == "ccl" else nn.Identity())

    def forward(self, features: Features, teacher: Tensor, labels: Tensor) -> Tensor:
        """The term to add to the student's classification loss."""
        teacher = self.teacher(teacher)
        if self.method == "csc":
            similarity = cosine_matrix(features.pooled, teacher).detach()
            return csc_loss(features.pooled, teacher, similarity, labels, self.offset)
        if self.method == "kd":
            return kd_loss(features.logits, self.classify(teacher), labels)
        if self.method == "ccl":
            return ccl_loss(features, teacher, labels, self.student, self.classify)
        projected = self.student(features.pooled)
        return crd_loss(projected, teacher, labels) if self.method == "crd" else fitnet_loss(projected, teacher)

def linear_probe(embeddings: Tensor, labels: Tensor, num_classes: int, decay: float = 0.1) -> nn.Linear:
    """Frozen logistic regression, embeddings (N, D) to logits (N, C), by L-BFGS; `decay` is relative to the variance."""
    probe = nn.Linear(embeddings.shape[1], num_classes)
    for parameter in probe.parameters():                                  # a convex problem: no seed has a say
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = decay * embeddings.var() * probe.weight.square().sum()
        loss = classification_loss(probe(embeddings), labels) + penalty
        loss.backward()
        return loss
    optimizer.step(closure)
    return probe.requires_grad_(False)

# ============================================== 3. Networks (attribute names are those of the released checkpoints)
class Features(NamedTuple):
    """What a student returns."""
    map: Tensor     # (B, K, D) one feature per position: t, h, w (video) or t, mel (audio), the last one fastest
    pooled: Tensor  # (B, D) the clip's embedding, non-negative
    logits: Tensor  # (B, C)

class FactorisedConv3d(nn.Module):
    """(B, c_in, T, H, W) -> (B, c_out, T', H', W'): spatial conv, BN, ReLU, temporal conv; about a 3-d one's weights."""
    def __init__(self, c_in: int, c_out: int, kernel: Sequence[int], stride: Sequence[int] = (1, 1, 1)) -> None:
        super().__init__()
        (kt, kh, kw), (st, sh, sw) = kernel, stride
        middle = (kt * kh * kw * c_in * c_out) // (kh * kw * c_in + kt * c_out)
        self.spatial_conv = nn.Conv3d(c_in, middle, (1, kh, kw), (1, sh, sw), (0, kh // 2, kw // 2), bias=False)
        self.bn = nn.BatchNorm3d(middle)
        self.temporal_conv = nn.Conv3d(middle, c_out, (kt, 1, 1), (st, 1, 1), (kt // 2, 0, 0), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.temporal_conv(F.relu(self.bn(self.spatial_conv(x))))

class VideoBlock(nn.Module):
    """Residual block of two factorised 3x3x3 convolutions; `downsample` halves all axes, its shortcut is factorised."""
    def __init__(self, c_in: int, c_out: int, downsample: bool = False) -> None:
        super().__init__()
        stride = (2, 2, 2) if downsample else (1, 1, 1)
        if downsample:
            self.downsampleconv = FactorisedConv3d(c_in, c_out, (1, 1, 1), stride)
            self.downsamplebn = nn.BatchNorm3d(c_out)
        self.downsample = downsample
        self.conv1 = FactorisedConv3d(c_in, c_out, (3, 3, 3), stride)
        self.bn1 = nn.BatchNorm3d(c_out)
        self.conv2 = FactorisedConv3d(c_out, c_out, (3, 3, 3))
        self.bn2 = nn.BatchNorm3d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsamplebn(self.downsampleconv(x)) if self.downsample else x
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(shortcut + self.bn2(self.conv2(x)))

class VideoNet(nn.Module):
    """The authors' R(2+1)D. Not torchvision's r2plus1d_18: stem, second convolution and shortcut have other widths.

    num_classes  C
    blocks       residual blocks per stage: (1, 1, 1, 1) is the released scripts' "depth 18", (3, 4, 6, 3) their 34
    width        channels of the first stage (authors: 64); D = 8 * width
    """
    def __init__(self, num_classes: int, blocks: Sequence[int] = (1, 1, 1, 1), width: int = 64) -> None:
        super().__init__()
        self.conv1 = FactorisedConv3d(3, width, (3, 7, 7), (1, 2, 2))
        self.bn1 = nn.BatchNorm3d(width)
        widths = (width, width, 2 * width, 4 * width, 8 * width)
        for i, count in enumerate(blocks):                                 # conv2 .. conv5
            rest = nn.Sequential(*(VideoBlock(widths[i + 1], widths[i + 1]) for _ in range(count - 1)))
            first = VideoBlock(widths[i], widths[i + 1], downsample=i > 0)
            setattr(self, f"conv{i + 2}", nn.Sequential(OrderedDict(block1=first, blocks=rest)))
        self.cls = nn.Linear(8 * width, num_classes)

    def forward(self, frames: Tensor) -> Features:
        """frames (B, 3, T, H, W), ImageNet-normalised -> Features; 16x112x112 gives K = 2*7*7 = 98 positions."""
        x = F.relu(self.bn1(self.conv1(frames)))
        for i in range(2, 6):
            x = getattr(self, f"conv{i}")(x)                               # (B, D, T/8, H/16, W/16) in the end
        features = x.flatten(2).transpose(1, 2)                            # (B, K, D)
        pooled = features.mean(1)
        return Features(features, pooled, self.cls(pooled))

class LogMel(nn.Module):
    """PANNs' front end: waveform (B, samples) at 32 kHz, -1..1 -> (B, 1 + samples // 320, 64) decibels, always float32.

    Periodic Hann window of 1024, hop 320, power spectrum, 64 Slaney mel bins 50-14000 Hz, 10 log10(max(x, 1e-10)).
    """
    def __init__(self) -> None:
        super().__init__()
        self.mel = torchaudio.transforms.MelSpectrogram(32000, n_fft=1024, hop_length=320, f_min=50, f_max=14000,
                                                        n_mels=64, norm="slaney", mel_scale="slaney")
        self.decibel = torchaudio.transforms.AmplitudeToDB("power")

    def forward(self, samples: Tensor) -> Tensor:
        with torch.autocast(samples.device.type, enabled=False):      # half precision overflows here (PANNs issue 17)
            return self.decibel(self.mel(samples.float())).transpose(1, 2)

class AudioBlock(nn.Module):
    """(B, c_in, T, mel) -> (B, c_out, T // pool, mel // pool): two 3x3 conv + BN + ReLU, then average pooling."""
    def __init__(self, c_in: int, c_out: int, pool: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.pool = nn.BatchNorm2d(c_out), nn.BatchNorm2d(c_out), pool

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.avg_pool2d(x, self.pool) if self.pool > 1 else x

class AudioNet(nn.Module):
    """PANNs' CNN family. stages=4: Cnn10 (our audio student); stages=6: Cnn14, with dim=512 Cnn14_emb512.

    num_classes  C
    width        channels of the first block, doubled in each (PANNs: 64)
    stages       conv blocks; the sixth does not pool
    dim          width of the embedding; a student needs width * 2 ** (stages - 1), so that map and embedding agree
    PANNs' dropout is left out (SpecAugment does its work in training).
    """
    def __init__(self, num_classes: int, width: int = 64, stages: int = 4, dim: int = 512) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm1d(64)                                      # over the mel bins
        channels = [1] + [width * 2 ** i for i in range(stages)]
        for i in range(stages):
            setattr(self, f"conv_block{i + 1}", AudioBlock(channels[i], channels[i + 1], pool=2 if i < 5 else 1))
        self.stages = stages
        self.fc1 = nn.Linear(channels[-1], dim)
        self.fc_audioset = nn.Linear(dim, num_classes)

    def forward(self, logmel: Tensor) -> Features:
        """logmel (B, T, 64) decibels from `LogMel` -> Features; T >= 32."""
        x = self.bn0(logmel.transpose(1, 2)).transpose(1, 2)[:, None]      # (B, 1, T, 64)
        for i in range(self.stages):
            x = getattr(self, f"conv_block{i + 1}")(x)                     # (B, D, T / 16, 4) for Cnn10
        profile = x.mean(3)                                                # (B, D, T / 16): mean over mel
        pooled = F.relu(self.fc1(profile.amax(2) + profile.mean(2)))       # (B, dim)
        return Features(x.flatten(2).transpose(1, 2), pooled, self.fc_audioset(pooled))

def make_network(kind: str, num_classes: int, width: int, **more: Any) -> nn.Module:
    """The student or a teacher from scratch of one modality; D = 8 * width. `more`: the class's own arguments."""
    if kind == "video":        # channels-last: 1.1 to 1.5 times faster steps, same numbers
        return VideoNet(num_classes, width=width, **more).to(memory_format=torch.channels_last_3d)
    more = {"dim": 8 * width, **more}
    return AudioNet(num_classes, width, **more).to(memory_format=torch.channels_last)

class Prepare(nn.Module):
    """Raw views -> network input in float32, on the views' device.

    (B, T, 3, H, W) uint8 frames -> (B, 3, T, size, size) with ImageNet's mean and std (authors); `boxes` (B, 4), pixels
    x1, y1, x2, y2, are cropped and scaled, x1 > x2 mirrors. Without boxes the frames are taken as they are.
    (B, samples) int16 -> (B, T, 64) decibels. In train mode, if `spec_augment`, 2 time and 2 mel stripes of at most
    PANNs' widths (64 of 1001 frames, 8 of 64 bins) are masked with the batch mean.
    """
    def __init__(self, size: int = 112, spec_augment: bool = False) -> None:
        super().__init__()
        self.logmel, self.size, self.spec_augment = LogMel(), size, spec_augment
        self.mean = nn.Buffer(torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1))
        self.std = nn.Buffer(torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1))

    def forward(self, views: Tensor, boxes: Tensor | None = None) -> Tensor:
        if views.ndim == 5:
            if boxes is not None:                      # one call crops, scales and mirrors every frame of every clip
                rois = torch.cat([torch.arange(len(boxes), device=boxes.device)[:, None], boxes], dim=1)
                crops = torch.ops.torchvision.roi_align(        # ops.roi_align compiles if --deterministic on a GPU
                    views.flatten(1, 2).float(), rois, 1.0, self.size, self.size, 2, True)
                views = crops.unflatten(1, (-1, 3))
            return (views.transpose(1, 2).float() / 255 - self.mean) / self.std
        logmel = self.logmel(views.float() / 32767)
        if not (self.training and self.spec_augment):
            return logmel
        mean = logmel.mean()
        logmel = logmel - mean
        for axis, width in ((1, max(2, logmel.shape[1] * 64 // 1001)), (2, 8)) * 2:
            logmel = torchaudio.functional.mask_along_axis_iid(logmel, width, 0.0, axis)
        return logmel + mean

# ============================================== 4. Media (PyAV; opened and closed per call, one thread)
@contextmanager
def open_media(path: str | Path, *kinds: str) -> Iterator[list[Any]]:
    """The best stream of each kind ("audio", "video") in a local file. What goes wrong is an InputError with its path."""
    name = os.fspath(path)
    av.logging.set_level(None)                                                  # FFmpeg's own messages name no file
    try:
        if not os.path.isfile(name):
            raise InputError("not a regular file" if os.path.exists(name) else "no such file, or a link to none")
        if os.path.getsize(name) == 0:
            raise InputError("empty file (0 bytes)")
        alone = {"protocol_whitelist": ""}                      # a playlist may name further files, addresses and ports
        with (gzip.open(name) if name.endswith(".gz") else open(name, "rb") as file,
              av.open(file, "r", options=alone, metadata_errors="replace") as container):
            streams: list[Any] = [container.streams.best(kind) for kind in kinds]  # type: ignore[arg-type]
            for kind, stream in zip(kinds, streams):
                if stream is None or (kind == "video" and stream.disposition & av.stream.Disposition.attached_pic):
                    raise InputError(f"no {kind} stream")                       # a cover picture is no video
                if stream.codec_context is None:
                    raise InputError(f"its {kind} is in a codec that FFmpeg does not know; convert it")
                stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            yield streams
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except Exception as error:                                          # a dozen kinds, by what is wrong with the file
        raise InputError(f"{name}: cannot be decoded ({getattr(error, 'strerror', None) or error})") from error

def timed_frames(streams: list[Any], start: float, end: float | None, fps: float = math.inf) -> list[Iterator[Any]]:
    """Of each stream (seconds since the file's start, frame) from just before `start` to the first at `end`, less damaged
    packets and, of MP4 with an even rate, frames that no other builds on and no start + k / fps shows. The file is read
    once: while one stream is asked for, the other's packets wait in memory."""
    container = streams[0].container
    origin, total = (container.start_time or 0) / av.time_base, (container.duration or 0) / av.time_base
    if start > 0:
        with suppress(av.error.FFmpegError, OverflowError):                     # no index: decode from the beginning
            container.seek(int((max(start - 0.5, 0.0) + origin) * av.time_base))
    def decode(stream: Any, packets: Iterator[Any]) -> Iterator[tuple[float, Any]]:
        mp4 = stream.codec_context.name == "h264" and "mp4" in container.format.name            # whose times are exact
        rate, following = stream.average_rate if mp4 and stream.average_rate == stream.base_rate else None, 0.0
        period: Any = lambda frame: (frame.samples / frame.sample_rate if stream.type == "audio" else
                                     1 / float(stream.average_rate or 25))
        for packet in (packet for packet in packets if packet.stream is stream):
            if rate and packet.pts is not None and fps < math.inf:              # saves about a tenth of the time
                at, half = float(packet.pts * packet.time_base) - origin - start, 0.5 / float(rate)
                shown = math.ceil((at - half) * fps) <= (at + 3 * half) * fps   # at a k / fps, give or take half a frame
                stream.codec_context.skip_frame = "DEFAULT" if shown or at + start > total - 1 else "NONREF"
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                continue
            for frame in frames:
                seconds = following if frame.time is None else float(frame.time) - origin       # raw H.264 has no times
                following = seconds + period(frame)
                yield seconds, frame
                if end is not None and seconds >= end:                          # tells how long the one before is shown
                    return
    return [*map(decode, streams, itertools.tee(container.demux(streams), len(streams)))]

def check_length(stream: Any, start: float, end: float | None, got: float) -> None:
    """InputError where the header promises over 10 % (at least 0.3 s) more than the seconds got: a cut-off file."""
    if got <= 0:
        raise InputError(f"no {stream.type} between {start:g} and {'the end' if end is None else f'{end:g}'} s")
    container = stream.container
    if stream.duration:
        total = float(stream.duration * stream.time_base)
    else:                                               # Matroska tells when a stream ends, and that where it has a tag
        total = (container.duration or 0) / av.time_base if len(container.streams) == 1 else 0.0
        with suppress(ValueError):
            total = np.dot([*map(float, stream.metadata.get("DURATION", "").split(":"))], [3600, 60, 1])
        total -= (container.start_time or 0) / av.time_base
    promised = min(total, end or total) - start
    if got < promised - max(0.3, 0.1 * promised) and container.format.name not in ("mp3", "aac"):       # those guess it
        raise InputError(f"truncated, {got:.1f} of {promised:.1f} s of {stream.type} decoded")

def check_room(kind: str, seconds: float, rate: float) -> None:
    """InputError where so many seconds, at `rate` bytes each, would fill memory: damaged timestamps often reach far."""
    if seconds * rate > 2 ** 31:
        raise InputError(f"its {kind} reaches {seconds:.0f} s by its timestamps, and {2 ** 31 / rate:.0f} s fill the 2 "
                         "GiB that a clip may take; cut it into clips, or convert it if that is not its length")

def decode_audio(path: str | Path, start: float = 0.0, end: float | None = None, rate: int = 32000) -> Tensor:
    """Samples of the file's best audio stream: (samples,) float32 at `rate` Hz, mono, about -1..1.

    start, end  seconds on the file's own clock; end=None reads to its end
    Raises InputError: unreadable, no audio stream, nothing in the range, shorter than the header promises (but for WAV).
    """
    with open_media(path, "audio") as streams:
        return join_sound(streams[0], timed_frames(streams, start, end)[0], start, end, rate)

def join_sound(stream: Any, frames: Iterator[tuple[float, Any]], start: float, end: float | None, rate: int) -> Tensor:
    """What `decode_audio` returns or raises, of a stream and its `timed_frames`."""
    first, pieces = None, list[Any]()
    layout = lambda item: (item[1].format.name, item[1].layout.name, item[1].sample_rate)       # can change in mid-stream
    for _, group in itertools.groupby(frames, layout):
        resampler, queue = av.AudioResampler(format="flt", layout="mono", rate=rate), av.AudioFifo()
        for seconds, frame in group:
            check_room("audio", seconds + frame.samples / frame.sample_rate - start, 4 * rate)
            first = seconds if first is None else first
            frame.pts = None                                                    # no gap filling: sample counts keep time
            queue.write(frame)
            pieces += resampler.resample(queue.read()) if queue.samples > 16384 else []         # few calls: faster
        pieces += resampler.resample(queue.read()) if queue.samples else []
        pieces += resampler.resample(None)
    late = 0 if first is None else round((first - start) * rate)                # a late start is preceded by silence
    silence = np.zeros(max(late, 0), np.float32)
    samples = np.concatenate([silence, *(np.frombuffer(p.planes[0], np.float32, p.samples) for p in pieces)])
    samples = samples[max(-late, 0):][:None if end is None else round((end - start) * rate)]
    check_length(stream, start, end, len(samples) / rate)
    if not np.isfinite(samples).all():
        raise InputError("its audio holds numbers that are infinite, or none at all (NaN); mend or convert it")
    return torch.from_numpy(samples)

def to_picture(frame: Any, size: tuple[int, int] | int, scale: Any, convert: Any, planes: bool = False) -> Any:
    """A frame of PyAV upright, in `decode_video`'s size, RGB. With `planes` YUV 4:2:0 stays so, its range made full."""
    turns = round(frame.rotation / 90) % 4                                      # phones store the turn beside the picture
    if isinstance(size, int):
        sides = (frame.height, frame.width)
        height, width = (round(size * min(side / min(sides), 4)) for side in sides)
    else:
        height, width = size[::-1] if turns % 2 else size
    known = (0, 1, 2, 4, 5, 6, 7, 9)                                            # colour matrices that libswscale has
    if planes and not turns and frame.format.name in ("yuv420p", "yuvj420p") and frame.colorspace in known:
        return scale.reformat(frame, width, height, "yuvj420p", threads=1)
    if frame.format.name.startswith("yuv"):                                     # scaled first: half the time
        frame = scale.reformat(frame, width, height, threads=1)
    frame = convert.reformat(frame, width, height, "rgb24", None, Colorspace.ITU601, threads=1)
    if turns or planes:                                 # a new frame has not the tags that would change colours in JPEG
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(frame.to_ndarray(), turns)), "rgb24")
    return frame

def choose_pictures(stream: Any, frames: Iterator[Any], start: float, end: float | None, fps: float,
                    size: tuple[int, int] | int, planes: bool = False) -> list[Any]:
    """What `decode_video` returns or raises, of a stream and its `timed_frames`, as T frames of PyAV by `to_picture`."""
    pictures, reformatters, seconds = list[Any](), (VideoReformatter(), VideoReformatter()), start
    period = 1 / float(stream.average_rate or 25)
    for (seconds, frame), (following, _) in itertools.pairwise(itertools.chain(frames, [(None, None)])):
        stop = min(seconds + period if following is None else following, math.inf if end is None else end)
        picture = None
        while start + len(pictures) / fps < stop - 1e-6:
            picture = to_picture(frame, size, *reformatters, planes) if picture is None else picture
            pictures.append(picture)
            size = picture.height, picture.width                                # the shape of all, even if it changes
            check_room("video", len(pictures) / fps, 3 * math.prod(size) * fps)
    check_length(stream, start, end, seconds + period - start if pictures else 0.0)
    return pictures

def stack_pictures(pictures: list[Any]) -> Tensor:
    """T frames of PyAV in RGB -> (T, 3, H, W) uint8."""
    form = np.dtype((np.uint8, (pictures[0].height, pictures[0].width, 3)))                     # np.stack takes it twice
    frames = np.fromiter((picture.to_ndarray() for picture in pictures), form, len(pictures))
    return torch.from_numpy(frames).permute(0, 3, 1, 2)

def decode_video(path: str | Path, start: float = 0.0, end: float | None = None, fps: float = 4.0,
                 size: tuple[int, int] | int = (128, 171)) -> Tensor:
    """Frames of the file's best video stream at a fixed rate: (T, 3, H, W) uint8 RGB, T = ceil(seconds * fps).

    start, end  seconds on the file's own clock; end=None reads to its end.   fps  frame k is shown at start + k / fps.
    size  (H, W) in pixels, whatever the file's aspect ratio; or the shorter side, which keeps it (up to 4 to 1)
    Raises InputError: unreadable, no video stream, nothing in the range, shorter than the header promises.
    """
    with open_media(path, "video") as streams:
        frames, = timed_frames(streams, start, end, fps)
        return stack_pictures(choose_pictures(streams[0], frames, start, end, fps, size))

def decode_hdf5(path: str | Path, size: tuple[int, int] | int = (128, 171)) -> Tensor:
    """Frames of an authors' HDF5 file (dataset `video`, a JPEG each), otherwise as `decode_video`. Raises InputError."""
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{path}: frames in HDF5 need the package h5py; pip install h5py") from error
    if not os.path.isfile(path):
        raise InputError(f"{path}: not a regular file")
    codec, reformatters = av.CodecContext.create("mjpeg", "r"), (VideoReformatter(), VideoReformatter())
    codec.thread_count = 1
    try:
        with h5py.File(path) as file:
            frames = [codec.decode(av.Packet(np.asarray(jpeg, np.uint8).tobytes()))[0] for jpeg in file["video"]]
        return stack_pictures([to_picture(frame, size, *reformatters) for frame in frames])
    except Exception as error:
        raise InputError(f"{path}: no HDF5 file with a JPEG a frame in `video` ({error})") from error

# ============================================== 5. Data sets
class Clip(NamedTuple):
    """One sample of a data set. Times are those of the list; `load_streams` maps them onto the file."""
    id: str
    labels: tuple[int, ...]      # indices into the class names, at least one
    split: str                   # "train" or "eval"
    audio: str | None = None     # path of the file that holds the sound
    video: str | None = None     # path of the file that holds the picture; often the same
    start: float = 0.0           # seconds
    end: float | None = None     # None: to the end of the file
    named: bool = False          # True: a file of its name holds the segment alone, others do not; False: duration tells

def is_sound_only(path: str) -> bool:
    """True for the extensions that hold sound without picture."""
    return path.lower().endswith((".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus", ".aac", ".wav.gz"))

def walk_files(root: str | Path, *endings: str) -> Iterator[str]:
    """Paths of the files under `root` with such endings, upper folders first; linked folders once, hidden ones not."""
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        if (here := os.stat(folder)[1:3]) in seen:                                         # inode and device
            subfolders.clear()
            continue
        seen.add(here)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths = (f"{folder}/{name}" for name in files if name[0] != "." and name.endswith(endings or ""))
        yield from filter(os.path.isfile, paths) if endings else paths          # lists are opened at once: no pipes

def walk_media(root: str | Path) -> list[str]:
    """Sorted paths of the media files under `root`, told by extension."""
    pictures = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".hdf5")
    return sorted(path for path in walk_files(root) if path.lower().endswith(pictures) or is_sound_only(path))

def match_files(rows: Iterable[tuple[str, str, Clip]], names: Callable[[str], Iterable[str]], root: str | Path,
                skipped: list[tuple[str, str]] | None, most: int | None = 1) -> list[Clip]:
    """The clips of all (key, "file:line", clip) with their files under `root`, one or two each; else in `skipped`.

    names  keys that a file name may stand for; it belongs to the first `most` listed.  InputError if no clip has a file.
    """
    skipped, listed = [] if skipped is None else skipped, dict[str, Clip]()
    for key, place, clip in rows:
        if listed.setdefault(key, clip) is not clip:
            skipped.append((f"{clip.id} ({place})", "listed twice; the first row counts"))
    media = walk_media(root)
    for path in media:
        for key in itertools.islice(filter(listed.__contains__, names(path.rpartition("/")[2])), most):
            _, _, _, audio, video, *_ = clip = listed[key]                                 # of copies the first counts
            if is_sound_only(path):
                audio = path if audio in (None, video) else audio
            elif not video:
                video, audio = path, audio or (None if path.lower().endswith(".hdf5") else path)
            listed[key] = Clip._make((*clip[:3], audio, video, *clip[5:]))                  # _replace is slow
    lost = [clip for clip in listed.values() if not (clip.audio or clip.video)]
    if len(lost) == len(listed):
        first, seen = (", ".join(map(os.path.basename, some[:3])) or "none" for some in ([*listed], media))
        raise InputError(f"none of the {len(listed):,} clips listed has a file under {root}; listed: {first}; "
                         f"files seen: {seen}; names must agree")
    skipped += [(clip.id, "missing: listed, but no file has its name") for clip in lost]
    return [clip for clip in listed.values() if clip.audio or clip.video]

def read_segments(table: str, split: str, index_of: dict[str, int]) -> Iterator[tuple[str, str, Clip]]:
    """Rows for `match_files` of an AudioSet list, `id, start, end, "mid,mid"`, whatever an editor did to its quotes."""
    labels_of: dict[str, tuple[int, ...]] = {}                          # few of two million rows have others' labels
    with open(table, encoding="utf-8-sig", errors="replace") as file:
        for n, line in enumerate(file, 1):                              # quotes say nothing here, and csv takes longer
            if (line[0] == "#" and not line.startswith("#NAME")) or not line.strip('", \n'):
                continue
            try:
                ytid, begin, stop, mids = line.replace('"', "").split(",", 3)
                if mids not in labels_of:
                    labels_of[mids] = tuple(sorted({index_of[mid.strip()] for mid in mids.split(",") if mid.strip()}))
                ytid, start, end = ytid.strip(), float(begin), float(stop)
                if not (len(ytid) == 11 and 0 <= start < end < math.inf and labels_of[mids]):
                    raise ValueError
                yield ytid, f"{table}:{n}", Clip._make((ytid, labels_of[mids], split, None, None, start, end, False))
            except ValueError:
                raise InputError(f"{table}:{n}: expected 'id, start, end, \"label,label\"' with 11 characters of id, "
                                 f"0 <= start < end, got {line.strip()[:200]!r}; mend or remove the line") from None
            except KeyError as error:
                raise InputError(f"{table}:{n}: unknown label {error}, it is not in class_labels_indices.csv") from None

def read_audioset(root: str | Path, split: str = "balanced",
                  skipped: list[tuple[str, str]] | None = None) -> tuple[list[Clip], list[str]]:
    """AudioSet: `class_labels_indices.csv`, `*_segments.csv` and media anywhere under `root` -> clips, display names.

    split    training list: "balanced", "unbalanced" or "all"; the eval list is always read.
    skipped  if given, gets (id or path, reason) of all that is listed and left out; so with every reader.
    A file's name begins with the clip's id, or with Y, v_, id_ or v before it. Raises InputError naming file and line.
    """
    tables = sorted(walk_files(root, ".csv"))
    labels_file = next((path for path in tables if os.path.basename(path) == "class_labels_indices.csv"), None)
    if labels_file is None:
        raise InputError(f"no class_labels_indices.csv under {root}; AudioSet publishes it beside the segment lists")
    try:
        with open(labels_file, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            classes = sorted((int(row["index"]), row["mid"], row["display_name"].strip())
                             for row in reader if any(row.values()))
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        raise InputError(f"{labels_file}:{reader.line_num}: expected UTF-8 with a header index,mid,display_name "
                         f"({error!r})") from error
    index_of, lists = {mid: i for i, (_, mid, _) in enumerate(classes)}, []
    for table in (path for path in tables if path.endswith("_segments.csv")):
        kind = next((k for k in ("unbalanced", "balanced", "eval") if k in os.path.basename(table)), "")
        if kind and (kind == "eval" or split in (kind, "all")):
            lists.append(read_segments(table, "eval" if kind == "eval" else "train", index_of))
    ids = lambda name: (name.removeprefix(prefix)[:11] for prefix in ("", "Y", "v_", "id_", "v"))       # may begin an id
    return match_files(itertools.chain(*lists), ids, root, skipped), [name for _, _, name in classes]

def read_ucf101(root: str | Path, fold: int = 1,
                skipped: list[tuple[str, str]] | None = None) -> tuple[list[Clip], list[str]]:
    """UCF-101: `UCF-101/<Class>/*.avi` and `ucfTrainTestlist/` -> clips and names of the 51 classes that have sound.

    fold  1, 2 or 3.  Case does not matter: UCF-101 itself has HandstandPushups/v_HandStandPushups_*. Raises InputError.
    """
    with_sound = """applyeyemakeup applylipstick archery babycrawling balancebeam bandmarching basketballdunk blowdryhair
        blowingcandles bodyweightsquats bowling boxingpunchingbag boxingspeedbag brushingteeth cliffdiving cricketbowling
        cricketshot cuttinginkitchen fieldhockeypenalty floorgymnastics frisbeecatch frontcrawl haircut hammerthrow
        hammering handstandpushups handstandwalking headmassage icedancing knitting longjump moppingfloor parallelbars
        playingcello playingdaf playingdhol playingflute playingsitar rafting shavingbeard shotput skydiving soccerpenalty
        stillrings sumowrestling surfing tabletennisshot typing unevenbars wallpushups writingonboard""".split()
    skipped = [] if skipped is None else skipped
    folders = {p.name.lower(): p for p in Path(root).iterdir() if p.is_dir()}
    lists = folders.get("ucftraintestlist", Path(root) / "ucfTrainTestlist")
    try:
        names, train, evaluation = ((lists / name).read_text("utf-8-sig", "replace").splitlines() for name in
                                    ("classInd.txt", f"trainlist0{fold}.txt", f"testlist0{fold}.txt"))
    except OSError as error:
        raise InputError(f"{error.filename} is missing; UCF-101's train/test lists have it (--fold 1, 2 or 3)") from None
    classes = sorted(line.split()[-1] for line in names if line.strip() and line.split()[-1].lower() in with_sound)
    index_of, rows = {name.lower(): i for i, name in enumerate(classes)}, []
    for part, lines in (("train", train), ("eval", evaluation)):
        for entry in [line.split()[0] for line in lines if line.strip()]:
            folder, stem = entry.split("/")[0].lower(), Path(entry).stem
            if folder in index_of:
                rows.append((stem.lower(), f"the {part} list", Clip(stem, (index_of[folder],), part)))
            else:
                skipped.append((entry, "its class is not among the 51 that have sound, or not in classInd.txt"))
    return match_files(rows, lambda name: [Path(name).stem.lower()], root, skipped), classes

def annotation_file(root: str | Path) -> str | None:
    """The JSON that `read_annotations` reads: annotation.json, which tells the class order, else the highest version."""
    names = ("activity_net", "annotation.json")
    return max((path for path in walk_files(root, ".json") if os.path.basename(path).startswith(names)),
               key=os.path.basename, default=None)

def read_annotations(root: str | Path, skipped: list[tuple[str, str]] | None = None) -> tuple[list[Clip], list[str]]:
    """ActivityNet's `activity_net*.json` or the authors' `annotation.json`, whose `labels` tell the class order.

    A clip is a segment (authors), its file `<clip id>.*`, cut already, or the whole video `v_<id>.*`. Raises InputError.
    """
    path, parts, rows = str(annotation_file(root)), {"training": "train", "validation": "eval"}, []
    segments: dict[str, list[str]] = {}                                         # whole video: its clips
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        entries = [(f"v_{key}_{k}" if "annotations" in entry else key, entry["subset"], note) for key, entry in
                   content["database"].items() for k, note in enumerate(entry.get("annotations", [entry]))]
        classes = list(content.get("labels") or sorted({note["label"] for _, _, note in entries}))
        for name, subset, note in entries:
            if subset in parts:
                start, end = map(float, note["segment"]) if "segment" in note else (0.0, None)
                if end is not None and not 0 <= start < end < math.inf:
                    raise ValueError(f"{name}: segment {note['segment']}, needs 0 <= start < end; mend or remove it")
                label, key = classes.index(note["label"]), name.lower()
                rows.append((key, path, Clip(name, (label,), parts[subset], None, None, start, end, named=True)))
                segments.setdefault(key.rpartition("_")[0], []).append(key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: expected `database` of id: subset, label, segment, annotations ({error!r})") from error
    ids = {key for key, *_ in rows}
    def names(name: str) -> list[str]:
        stem, ending = os.path.splitext(name.lower())                           # frames of a whole video tell no segment
        return [stem] if stem in ids or ending == ".hdf5" else segments.get(stem, segments.get(f"v_{stem}", []))
    return match_files(rows, names, root, skipped, most=None), classes

def read_vggsound(root: str | Path, skipped: list[tuple[str, str]] | None = None) -> tuple[list[Clip], list[str]]:
    """VGGSound: `vggsound.csv` (id, start, label, split) or `train.csv` and `test.csv` (file, label); clips of 10 s.

    Files are `<id>_<start:06d>.*` or other downloaders' `v<id>_<start>_...`. Raises InputError naming file and line.
    """
    tables = {os.path.basename(path): path for path in walk_files(root, ".csv")}
    rows, label_of = [], dict[str, str]()
    for name in ["vggsound.csv"] if "vggsound.csv" in tables else [n for n in ("train.csv", "test.csv") if n in tables]:
        with open(tables[name], newline="", encoding="utf-8-sig", errors="replace") as file:
            reader, row = csv.reader(file, skipinitialspace=True), list[str]()
            try:
                for row in filter(any, reader):
                    if len(row) == 2:
                        row = [row[0][:11], os.path.splitext(row[0])[0][12:], row[1], Path(name).stem]
                    ytid, start, label, split = row
                    key, part = f"{ytid}_{int(start):06d}", {"train": "train", "test": "eval"}[split]
                    if int(start) < 0:
                        raise ValueError("a start before 0")
                    rows.append((key, f"{file.name}:{reader.line_num}", part, float(start)))
                    label_of.setdefault(key, label)
            except (ValueError, KeyError, csv.Error) as error:
                raise InputError(f"{file.name}:{reader.line_num}: expected id, start in seconds, label, train or test; "
                                 f"got {row!r} ({error}); mend or remove the line, or close its quotes") from None
    classes = sorted({*label_of.values()})
    clips = ((key, place, Clip(key, (classes.index(label_of[key]),), part, None, None, start, start + 10))
             for key, place, part, start in rows)
    whole = {ytid_start[:11]: ytid_start for ytid_start, *_ in rows}
    def keys(name: str) -> Iterator[str]:
        for n in (name, name.removeprefix("v")):
            if n[11:12] == ".":
                yield whole.get(n[:11], "")
            start, end, *_ = f"{n[12:].split('.')[0]}__".split("_")
            if start.isdecimal() and end.isdecimal() and int(end) - int(start) >= 1000:         # audiosetdl: milliseconds
                start = str(int(start) // 1000)
            yield f"{n[:11]}_{start:0>6}"
    return match_files(clips, keys, root, skipped), classes

def read_folder(root: str | Path, skipped: list[tuple[str, str]] | None = None) -> tuple[list[Clip], list[str]]:
    """A folder of folders: `train/<label>/*` and `val/<label>/*`, one label a clip -> clips and sorted class names."""
    files: dict[str, list[str]] = {}                                    # sound and picture may be two
    for path in (path for part in ("train", "val") for path in walk_media(Path(root) / part)):
        files.setdefault(os.path.splitext(os.path.relpath(path, root))[0], []).append(path)
    classes = sorted({name.split("/")[1] for name in files if name.count("/") > 1})
    if not classes:
        raise InputError(f"no media file under {root}/train/<label>/ or {root}/val/<label>/")
    clips = []
    for name, paths in files.items():
        folder, label, *rest = name.split("/")
        if rest:
            part, video = "train" if folder == "train" else "eval", next((p for p in paths if not is_sound_only(p)), None)
            audio = next(filter(is_sound_only, paths), video)
            clips.append(Clip(name, (classes.index(label),), part, audio, video))
        elif skipped is not None:
            skipped.append((paths[0], f"lies in {folder}/ itself; expected {folder}/<label>/"))
    return clips, classes

def load_streams(clip: Clip, kinds: Sequence[str], fps: float = 4.0, size: tuple[int, int] | int = 128,
                 planes: bool = False) -> Iterator[Any]:
    """One after the other, "audio": (samples,) float32 at 32 kHz, "video": (T, 3, H, W) uint8. Raises InputError.

    planes  frames (but those of HDF5) as a list of PyAV's, which `pack_frames` need not convert from RGB
    A file that holds both is read once, but not one of 128 MiB, since packets wait in memory. Unless the clip tells, a
    file is cut already if its duration is nearer to the segment's than to the segment's end.
    """
    large = clip.audio is not None and os.path.isfile(clip.audio) and os.path.getsize(clip.audio) >= 2 ** 27
    for (path, _), group in itertools.groupby(kinds, lambda kind: (getattr(clip, kind), large and kind)):
        wanted, start, end = [*group], clip.start, clip.end
        if path is None:
            raise InputError(f"{clip.id}: no file with a {wanted[0]} stream")
        if wanted == ["video"] and path.lower().endswith(".hdf5"):
            yield decode_hdf5(path, size)
            continue
        with open_media(path, *wanted) as streams:
            duration = (streams[0].container.duration or 0) / av.time_base
            if clip.named and Path(path).stem.lower() == clip.id.lower():
                start, end = 0.0, None
            elif not clip.named and start > 0 and end and 0 < duration < max(end - start + 0.5, end - start / 2):
                start, end = 0.0, end - start
            for stream, frames in zip(streams, timed_frames(streams, start, end, fps)):
                if stream.type == "audio":
                    yield join_sound(stream, frames, start, end, 32000)
                else:
                    pictures = choose_pictures(stream, frames, start, end, fps, size, planes)
                    yield pictures if planes else stack_pictures(pictures)

# ============================================== 6. Demo data (made from the seed; no files)
def demo_clips(tags: bool, train: int = 480, evaluation: int = 240) -> tuple[list[Clip], list[str]]:
    """One-second clips of ten events, five kinds (shape, pitch) in two ways (motion, glide); `tags`: 40 % hold two."""
    kinds, ways = ("disc", "ring", "square", "cross", "bar"), ("sideways and falling", "upright and rising")
    rng, clips = np.random.default_rng(0), []
    for i in range(train + evaluation):
        split = "train" if i < train else "eval"
        second = [int(i + rng.integers(1, 10)) % 10] if tags and rng.random() < 0.4 else []
        clips.append(Clip(f"{split}-{i:04d}", tuple(sorted([i % 10, *second])), split, "demo", "demo", 0.0, 1.0))
    return clips, [f"{kind} {way}" for kind in kinds for way in ways]

def demo_truth(clip: Clip, seed: int, noise: float, mismatch: float) -> tuple[list[int], list[int]]:
    """What the dials do to a clip's teacher modality: (events shown in it, irrelevant events mixed in)."""
    rng = np.random.default_rng([seed, *clip.id.encode()])
    noisy, wrong, silent = rng.random(3) < (noise, mismatch if clip.split == "train" else 0.0, 0.3)
    others = rng.permutation([c for c in range(10) if c not in clip.labels]).tolist()
    shown = list(clip.labels) if not wrong else [] if silent else [others.pop() for _ in clip.labels]
    return shown, others[:rng.integers(1, 3)] if noisy else []

def demo_sound(events: Sequence[tuple[int, float]], snr: float, rng: np.random.Generator, rate: int = 32000) -> Tensor:
    """One second of gliding calls, (event, loudness) each, at `snr` decibels in pink noise: (rate,) float32."""
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(rate)) / np.sqrt(np.maximum(np.arange(rate // 2 + 1), 20)), rate)
    sound = noise / noise.std() * 10 ** (-snr / 20)
    for event, loudness in events:
        n = int(rng.uniform(0.25, 0.5) * rate)
        at, t = int(rng.integers(0, rate - n)), np.linspace(0, 1, n)
        pitch = 260 * 1.5 ** (event // 2) * rng.uniform(0.93, 1.07) * 2 ** ((t - 0.5) * (0.8 if event % 2 else -0.8))
        phase = 2 * np.pi * np.cumsum(pitch) / rate
        call = sum(np.sin(k * phase + rng.uniform(0, 6.3)) / k for k in (1, 2, 3)) * np.sin(np.pi * t)
        sound[at:at + n] += loudness * call / call.std()
    return torch.from_numpy((sound / np.abs(sound).max() * rng.uniform(0.3, 0.9)).astype(np.float32))

def demo_picture(events: Sequence[tuple[int, float]], contrast: float, rng: np.random.Generator, frames: int,
                 side: int) -> Tensor:
    """Moving shapes, (event, opacity) each, before a grainy texture: (frames, 3, side, side) uint8."""
    texture = F.interpolate(torch.from_numpy(rng.standard_normal((1, 3, 6, 6))), side, mode="bicubic")[0].numpy()
    movie = 110 + 25 * texture + 12 * rng.standard_normal((frames, 1, side, side))
    colors = np.array([[230, 60, 60], [60, 220, 70], [70, 90, 240], [230, 220, 60], [230, 80, 220]])
    for event, opacity in events:
        color = (colors[event // 2] + rng.uniform(-40, 40, 3)).reshape(3, 1, 1)
        radius, (y, x) = rng.uniform(0.18, 0.28) * side, rng.uniform(0.28, 0.72, 2) * side
        path = rng.choice([-1, 1]) * rng.uniform(0.4, 0.8) * side * (np.arange(frames) / frames - 0.5)
        for frame, moved in zip(movie, path):
            v, u = np.ogrid[:side, :side]
            v, u = (v - y - moved * (event % 2)) / radius, (u - x - moved * (1 - event % 2)) / radius
            r, edge = np.hypot(u, v), np.maximum(abs(u), abs(v))
            mask = (r < 1, (r < 1) & (r > 0.6), edge < 0.85, (edge < 1) & (np.minimum(abs(u), abs(v)) < 0.3),
                    (edge < 1) & (abs(u + v) < 0.45))[event // 2]
            frame += mask * contrast * opacity * (color - frame)
    return torch.from_numpy(movie.clip(0, 255).astype(np.uint8))

def demo_streams(clip: Clip, kinds: Sequence[str], student: str, seed: int, noise: float, mismatch: float, fps: float,
                 side: int) -> Iterator[Tensor]:
    """Streams of a demo clip: the student's modality is faint but true, the teacher's clear but as the dials say."""
    for kind in kinds:
        rng = np.random.default_rng([seed, *f"{clip.id} {kind}".encode()])
        shown, mixed = (clip.labels, []) if kind == student else demo_truth(clip, seed, noise, mismatch)
        events = [(event, 1.0) for event in shown] + [(event, 0.6) for event in mixed]
        if kind == "audio":
            yield demo_sound(events, rng.uniform(-18, -3) if kind == student else rng.uniform(3, 12), rng)
        else:
            contrast = rng.uniform(0.15, 0.5) if kind == student else rng.uniform(0.7, 1.0)
            yield demo_picture(events, contrast, rng, max(1, round(fps)), side)

# ============================================== 7. Clip store and views
def pack_frames(frames: Tensor | list[Any]) -> np.ndarray:
    """(T, 3, H, W) uint8, or T frames of PyAV -> (L,) uint8: where each part begins and the last ends, T + 1 numbers of 4
    bytes, then T parts: the colour matrix (FFmpeg's number, a byte) and a JPEG, less the Huffman table that the standard
    suggests: a tenth smaller, a sixth faster to decode. 3 to 5 kB a frame of 128 x 171."""
    images = frames if isinstance(frames, list) else [
        av.VideoFrame.from_ndarray(image, format="rgb24") for image in frames.permute(0, 2, 3, 1).numpy()]
    codec = av.CodecContext.create("mjpeg", "w")
    codec.height, codec.width = images[0].height, images[0].width
    codec.options = {"huffman": "default"}                              # own tables: a tenth smaller, half as fast
    codec.pix_fmt, codec.time_base, codec.thread_count, codec.qmin, codec.qmax = "yuvj420p", Fraction(1, 25), 1, 2, 2
    jpegs = list[bytes]()
    for k, image in enumerate(images):
        image.pts, image.time_base = k, codec.time_base                 # they must rise, and a picture may come again
        jpegs += map(bytes, codec.encode(image))
    jpegs += map(bytes, codec.encode(None))
    parts = list[bytes]()
    for image, jpeg in zip(images, jpegs, strict=True):
        table = jpeg.index(b"\xff\xc4")                                 # Huffman's; where it is missing, FFmpeg knows it
        rest = table + 2 + int.from_bytes(jpeg[table + 2:table + 4])
        parts.append(bytes([image.colorspace]) + jpeg[:table] + jpeg[rest:])
    bounds = np.cumsum([4 * len(parts) + 4, *map(len, parts)], dtype=np.uint32)
    return np.frombuffer(b"".join([bounds.tobytes(), *parts]), np.uint8)

def stream_length(stream: np.ndarray) -> int:
    """Samples or frames of a stream as `ClipStore` gives it: of packed frames the first begins behind T + 1 bounds."""
    return len(stream) if stream.ndim == 4 or stream.dtype == np.int16 else int(stream[:4].view(np.uint32)[0]) // 4 - 1

def read_frames(stream: np.ndarray, window: Sequence[int]) -> Tensor:
    """The frames of a window, (len(window), 3, H, W) uint8, of `pack_frames`' result or of (T, H, W, 3) uint8."""
    if stream.ndim == 4:
        span = slice(window[0], window[-1] + 1)
        consecutive = [*window] == [*range(span.start, span.stop)]      # then it is a view of the file: nothing is copied
        return torch.from_numpy(stream[span if consecutive else window]).movedim(3, 1)
    stream, images = np.asarray(stream), dict[int, np.ndarray]()
    bounds = stream[:4 * stream_length(stream) + 4].view(np.uint32).tolist()
    codec, reformatter = av.CodecContext.create("mjpeg", "r"), VideoReformatter()               # once: half the time
    codec.thread_count = 1
    for k in {*window}:                                                 # each once, although a window may loop
        part = stream[bounds[k]:bounds[k + 1]].tobytes()
        picture = codec.decode(av.Packet(part[1:]))[0]
        picture.colorspace = part[0]                                    # a JPEG itself cannot tell
        images[k] = reformatter.reformat(picture, format="rgb24", threads=1).to_ndarray()
    return torch.from_numpy(np.stack([images[k] for k in window])).movedim(3, 1)

class ClipStore(Dataset[Any]):
    """Streams of clips, each decoded once into a file of its own: int16 samples at 32 kHz; frames, as JPEG unless `raw`.

    folder  of files that are named after all that they depend on: runs may share it; None: each use decodes again
    load    (clip, kinds) -> samples or frames of each kind;   depends: per kind, on what they do besides clip and file
    """
    def __init__(self, folder: Path | None, clips: list[Clip], load: Callable[[Clip, Any], Iterator[Any]], depends: Any,
                 raw: bool = False) -> None:
        self.folder, self.clips, self.load, self.depends, self.raw = folder, clips, load, depends, raw

    def key(self, i: int, kind: str) -> str:
        """Changes with all that the stream of clip i depends on, the state of its file included."""
        clip, path = self.clips[i], getattr(self.clips[i], kind)
        stat = os.stat(path) if path and os.path.isfile(path) else None
        source = (os.path.abspath(path), stat.st_size, stat.st_mtime_ns, *clip[5:]) if path and stat else clip
        as_decoded = kind == "video" and (self.raw or self.folder is None)
        return digest(__version__, clip.id, kind, source, self.depends[kind], as_decoded)

    def streams(self, i: int, kinds: Sequence[str]) -> list[np.ndarray]:
        """Samples (n,) int16, or frames as `read_frames` takes them, by kind. InputError: clip i cannot be decoded."""
        files, found = dict[str, str](), dict[str, np.ndarray]()
        for kind in kinds if self.folder else ():
            files[kind] = f"{self.folder}/clips/{(name := self.key(i, kind))[:2]}/{name}.npy"   # no Path: faster
            with suppress(FileNotFoundError, ValueError):               # not there yet, or damaged since
                stream = np.lib.format.open_memmap(files[kind], mode="c")       # np.load opens it twice
                if stream_length(stream) > 0:
                    found[kind] = stream
        missing = [kind for kind in kinds if kind not in found]
        loaded = self.load(self.clips[i], missing)
        for kind in missing:
            try:
                content = next(loaded)
                found[kind] = (content.clamp(-1, 1).mul_(32767).round_().short().numpy() if kind == "audio" else
                               pack_frames(content) if files and not self.raw else
                               content.movedim(1, 3).contiguous().numpy())
            except InputError:
                raise
            except Exception as error:                                  # unforeseen: one clip must not end a long run
                raise InputError(f"{type(error).__name__}: {error}") from error
            if files:
                Path(files[kind]).parent.mkdir(parents=True, exist_ok=True)
                write(Path(files[kind]), found[kind])
        return [found[kind] for kind in kinds]

    def __getitem__(self, job: tuple[int, Sequence[str]]) -> tuple[int, list[int], int, str]:
        """Job (clip, kinds): decodes what is not there yet -> (clip, length by kind, bytes, reason if unusable)."""
        try:
            streams = self.streams(*job)
            return job[0], [*map(stream_length, streams)], sum(stream.nbytes for stream in streams), ""
        except InputError as error:
            return job[0], [], 0, str(error)

    def decode(self, jobs: Sequence[tuple[int, Sequence[str]]], workers: int,
               progress: Callable[[int, int], None]) -> list[tuple[int, list[int], int, str]]:
        """The result of every job, in order, done by `workers` processes of each of torchrun's."""
        own, done = jobs[RANK::WORLD], []
        step = min(max(len(own) // 1000, 1), 256)                       # a worker's item; of one clip each it is slow
        parts: Any = [own[k:k + step] for k in range(0, len(own), step)]
        for results in watch(DataLoader(self, batch_sampler=parts, collate_fn=list, num_workers=workers), self):
            done += results
            progress(len(done), len(own))
        shares: list[Any] = [done] * WORLD
        if WORLD > 1:
            dist.all_gather_object(shares, done)
        return [shares[k % WORLD][k // WORLD] for k in range(len(jobs))]

def watch(loader: Any, store: ClipStore) -> Iterator[Any]:
    """What the loader gives; if one of its processes dies, InputError with the clips that were due."""
    count = 0
    try:
        for count, item in enumerate(loader, 1):
            yield item
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        due, reason = [store.clips[i].id for i, _ in [*loader.batch_sampler][count]], str(error).splitlines()[0]
        raise InputError(f"{reason} Due were {', '.join(due)}; if memory ran out, lower --workers") from error

def even_windows(n: int, size: int = 16, count: int = 3) -> list[list[int]]:
    """Frame indices of up to `count` even windows of `size` out of n; stops at the first short one, looped. Authors."""
    stride = max(1, math.ceil((n - 1 - size) / max(count - 1, 1)))
    full = max((n - size) // stride + 1, 0)
    return sliding_windows(n, size, stride)[:min(full + 1, count)]

def sliding_windows(n: int, size: int = 16, stride: int = 16) -> list[list[int]]:
    """Frame indices of consecutive windows of `size` out of n frames; a last short one is looped. Authors."""
    return [[begin + i % min(size, n - begin) for i in range(size)] for begin in range(0, n, stride)]

class ViewSpec(NamedTuple):
    """What a network gets to see of a clip."""
    kind: str                    # "audio" or "video"
    frames: int = 16             # frames of a window (authors)
    size: int = 112              # side of the square view, pixels (authors)
    samples: int = 320000        # samples of a window at 32 kHz (PANNs: 10 s)
    crop_area: float = 0.25      # smallest area of a training crop (authors)
    flip: bool = True            # mirror half of the training views (authors)
    strong: bool = False         # all views grey, training views also inverted and rotated at random (ours)

class Views(Dataset[Any]):
    """Item (clip, seed): its views (n, ...), boxes (n, 4) for `Prepare`; in training also label and teacher embedding.

    protocol  "train": one view at random; "val": 3 even windows (authors, while training); "test": consecutive windows
              (authors, at the end), of sound in both, less a tail under half of one. The seed decides, not the worker.
    """
    def __init__(self, data: Data, spec: ViewSpec, protocol: str, teacher: Tensor | None = None) -> None:
        self.data, self.spec, self.protocol, self.teacher = data, spec, protocol, teacher
        random = [v2.RandomInvert(0.5), v2.RandomRotation(15)] if protocol == "train" else []
        self.recolor: Any = v2.Compose([v2.Grayscale(3), *random]) if spec.strong else nn.Identity()

    def random_box(self, frames: Tensor) -> Tensor:
        """A box of at least `crop_area` of the frame, sides 3:4 to 4:3; mirrored half the time."""
        top, left, height, width = RandomResizedCrop.get_params(frames, [self.spec.crop_area, 1.0], [3 / 4, 4 / 3])
        x = [left, left + width] if not self.spec.flip or torch.rand(()) < 0.5 else [left + width, left]
        return torch.tensor([[x[0], top, x[1], top + height]], dtype=torch.float32)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, ...]:
        (clip, seed), audio = key, self.spec.kind == "audio"
        stream, = self.data.store.streams(clip, [self.spec.kind])
        n, size = stream_length(stream), self.spec.samples if audio else self.spec.frames
        def window(start: int) -> Tensor:                               # what is too short is looped
            if audio:
                return torch.from_numpy(np.resize(stream[start:start + size], size))
            return self.recolor(read_frames(stream, [start + k % min(size, n - start) for k in range(size)]))
        if self.protocol == "train":
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                view = window(int(torch.randint(max(n - size, 0) + 1, ())))
                box = torch.zeros(1, 4) if audio else self.random_box(view)
            label = self.data.labels([clip])[0]
            return view[None], box, label, torch.zeros(0) if self.teacher is None else self.teacher[clip]
        choose = even_windows if self.protocol == "val" else partial(sliding_windows, stride=size)
        starts = range(0, max(n - size // 2, 1), size) if audio else [first for first, *_ in choose(n, size)]
        windows = torch.stack([*map(window, starts)])
        height, width = (0, 0) if audio else windows.shape[-2:]
        x, y = max(width - height, 0) / 2, max(height - width, 0) / 2   # the square in the middle
        return windows, torch.tensor([[x, y, width - x, height - y]]).expand(len(windows), 4)

def join_views(items: list[tuple[Tensor, ...]]) -> tuple[Any, ...]:
    """Views and boxes of all items of `Views`, number of views of each, the rest stacked; small frames' edges repeat."""
    views, boxes, *rest = map(list, zip(*items))
    counts = [len(view) for view in views]
    if frames := views[0].ndim == 5:
        views = [view.movedim(2, 4) for view in views]                  # (n, T, H, W, 3), as they lie in memory
        height, width = (max(view.shape[axis] for view in views) for axis in (2, 3))
        missing: Any = lambda view: [(0, 0)] * 2 + [(0, height - view.shape[2]), (0, width - view.shape[3]), (0, 0)]
        if len({view.shape[2:] for view in views}) > 1:
            views = [torch.from_numpy(np.pad(view, missing(view), "edge")) for view in views]
    even = len({*counts}) == 1                                          # then workers join them in shared memory at once
    joined = default_collate(views).flatten(0, 1) if even else torch.cat(views)
    return joined.movedim(4, 2) if frames else joined, torch.cat(boxes), counts, *(torch.stack(part) for part in rest)

class EpochBatches(Sampler[Any]):
    """Shuffled batches of (clip, view seed), given by seed and `epoch`; under torchrun each process's part of them.

    weights   chance of each clip, drawn with replacement; None: each clip once an epoch
    multiple  a last batch of less than twice that joins the one before, and leaves clips out to be a multiple of it
    """
    def __init__(self, clips: Sequence[int], batch_size: int, seed: int, weights: Tensor | None = None,
                 multiple: int = WORLD) -> None:
        self.clips, self.batch_size, self.seed, self.epoch = list(clips), batch_size, seed, 0
        self.weights, self.multiple = weights, multiple

    def __len__(self) -> int:
        n, size = len(self.clips), self.batch_size
        return max(1, n // size + (n % size >= 2 * self.multiple))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator, n = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch), len(self.clips)
        order = (torch.randperm(n, generator=generator) if self.weights is None else
                 torch.multinomial(self.weights, n, replacement=True, generator=generator)).tolist()
        seeds = torch.randint(2 ** 62, (n,), generator=generator).tolist()
        keys = [(self.clips[i], seed) for i, seed in zip(order, seeds)]
        for b in range(len(self)):
            batch = keys[b * self.batch_size:None if b == len(self) - 1 else (b + 1) * self.batch_size]
            part = len(batch) // self.multiple * self.multiple // WORLD
            yield batch[RANK * part:(RANK + 1) * part]

class Data(NamedTuple):
    """A data set ready to train on: unreadable clips are in neither `train` nor `eval`."""
    store: ClipStore
    classes: list[str]
    tags: bool                   # several labels a clip
    train: list[int]             # indices into store.clips
    eval: list[int]

    def labels(self, clips: Sequence[int]) -> Tensor:
        """Labels of clips: (n,) class indices or, for tags, (n, C) multi-hot float32."""
        labels = [self.store.clips[i].labels for i in clips]
        if not self.tags:
            return torch.tensor([first for first, *_ in labels])
        rows = torch.zeros(len(labels), len(self.classes))
        rows[[n for n, own in enumerate(labels) for _ in own], [*itertools.chain(*labels)]] = 1.0
        return rows

    def loader(self, clips: Sequence[int], spec: ViewSpec, protocol: str, settings: dict[str, Any], seed: int = 0,
               teacher: Tensor | None = None) -> Any:
        """Shuffled batches of training views, or the windows of each clip in order."""
        size, workers = max(1, settings["batch_size"] // WORLD), settings["workers"]
        size = min(size, 8) if spec.kind == "video" else size           # long videos have many windows
        batches: Any = [[(i, 0) for i in clips[b:b + size]] for b in range(0, len(clips), size)]
        if protocol == "train":
            weights, pairs = None, 2 if settings["mixup"] else 1
            if settings["class_balanced"]:              # a class at random, then one of its clips, as PANNs does
                owned = Counter(label for i in clips for label in self.store.clips[i].labels)
                weights = torch.tensor([sum(1 / owned[label] for label in self.store.clips[i].labels) for i in clips])
            batches = EpochBatches(clips, pairs * settings["batch_size"], seed, weights, pairs * WORLD)
        return DataLoader(Views(self, spec, protocol, teacher), batch_sampler=batches, collate_fn=join_views,
                          num_workers=workers, persistent_workers=workers > 0, pin_memory=torch.cuda.is_available())

# ============================================== 8. Metrics (fractions in 0..1)
def at_least(values: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """How many of the rising values reach each limit."""
    return len(values) - np.searchsorted(values, limits, "left")

def by_class(scores: Tensor, labels: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each class the rising scores, of all items and of its positives; scores, labels 0/1 (N, C)."""
    columns = torch.as_tensor(scores).cpu().numpy().T, torch.as_tensor(labels).cpu().numpy().T > 0
    for column, positive in zip(*columns, strict=True):
        yield np.sort(column), np.sort(column[positive])

def mean_average_precision(scores: Tensor, labels: Tensor) -> float:
    """Macro mAP: scores, labels 0/1 (N, C) -> mean over classes with a positive, ValueError if none; ties as sklearn."""
    columns = by_class(scores, labels)
    precisions = [(at_least(own, own) / at_least(every, own)).mean() for every, own in columns if len(own)]
    if not precisions:
        raise ValueError(f"mAP needs a positive; none of {scores.shape[1]} classes has one in {len(scores)} clips")
    return statistics.fmean(precisions)

def mean_auc(scores: Tensor, labels: Tensor) -> float:
    """Macro area under the ROC curve: scores, labels (N, C) -> mean over classes with both labels; nan if none."""
    areas = []
    for every, own in by_class(scores, labels):
        if 0 < len(own) < len(every):                                  # share of negatives below a positive, ties half
            below = sum(np.searchsorted(every, own, side) - np.searchsorted(own, own, side) for side in ("left", "right"))
            areas.append(np.mean(below / 2) / (len(every) - len(own)))
    return statistics.fmean(areas) if areas else math.nan

def topk_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of rows of scores (N, C) whose label (N,) is among the k highest; k is at most C."""
    scores, labels = torch.as_tensor(scores), torch.as_tensor(labels)
    return float((scores.topk(min(k, scores.shape[1]), dim=1).indices == labels[:, None]).any(1).double().mean())

def retrieval_metrics(queries: Tensor, gallery: Tensor, query_labels: Tensor, gallery_labels: Tensor,
                      ks: Sequence[int] = (1, 5, 10, 20, 50), topk: int = 500) -> dict[str, float]:
    """Retrieval by cosine: queries (Q, D), gallery (G, D), labels (Q,), (G,); relevant are items of the query's label.

    R@k             share of queries with a relevant item among the k nearest
    mAP             average precision over the full ranking, mean over all queries; one without relevant items counts 0
    mAP_released    the released scripts': cut at `topk`, divided by the hits inside, queries without a hit left out
    """
    gallery, known = F.normalize(torch.as_tensor(gallery), dim=1), torch.as_tensor(gallery_labels).cpu().numpy()
    first_hits, precisions, released = [], [], []
    for part, labels in zip(torch.as_tensor(queries).split(256), torch.as_tensor(query_labels).cpu().split(256)):
        for similarity, label in zip((F.normalize(part, dim=1) @ gallery.T).cpu().numpy(), labels.tolist()):
            own = np.sort(similarity[known == label])
            count = np.arange(len(own), 0, -1)                                              # of hits so far
            ranks = at_least(np.sort(similarity), own) - at_least(own, own) + count         # of equal ones, misses first
            precision = count / ranks
            first_hits.append(ranks.min() if len(own) else math.inf)
            precisions.append(precision.mean() if len(own) else 0.0)
            released += [precision[ranks <= topk].mean()] if (ranks <= topk).any() else []
    return {**{f"R@{k}": float(np.mean(np.array(first_hits) <= k)) for k in ks}, "mAP": float(np.mean(precisions)),
            "mAP_released": float(np.mean(released)) if released else 0.0}

def score(task: str, scores: Tensor, labels: Tensor) -> dict[str, float]:
    """A task's metrics from probabilities (N, C). d' = sqrt(2) * probit(mean AUC), the AUC kept 1e-9 off 0 and 1.

    Where every class is in all clips or in none, AUC and d' do not exist and are left out.
    """
    if task != "audio_tagging":
        return {"top1": topk_accuracy(scores, labels, 1), "top5": topk_accuracy(scores, labels, 5)}
    metrics, auc = {"mAP": mean_average_precision(scores, labels)}, mean_auc(scores, labels)
    if math.isfinite(auc):
        probit = statistics.NormalDist().inv_cdf(min(max(auc, 1e-9), 1 - 1e-9))
        metrics |= {"AUC": auc, "d_prime": math.sqrt(2) * probit}
    return metrics

# ============================================== 9. Training and evaluation
STUDENT_KIND = {"audio_tagging": "audio", "action_recognition": "video", "video_retrieval": "video"}
CHECK_METRIC = {"audio_tagging": "mAP", "action_recognition": "top1", "video_retrieval": "top1"}  # picks best.pt
METHODS = ("student", "kd", "fitnet", "crd", "ccl", "mnf", "csc", "xmkd")

class Job(NamedTuple):
    """What the parts of a run share."""
    settings: dict[str, Any]     # every option, by name
    data: Data
    spec: ViewSpec               # views of the student's modality or, while a teacher is made, of the teacher's
    console: Console

def view_spec(settings: dict[str, Any]) -> ViewSpec:
    """What the student gets to see by the settings."""
    return ViewSpec(STUDENT_KIND[settings["task"]], samples=round(settings["seconds"] * 32000),
                    **{name: settings[name] for name in ("frames", "size", "crop_area", "flip", "strong")})

@torch.no_grad()
def predict(job: Job, network: nn.Module, clips: Sequence[int], protocol: str = "test",
            label: str = "evaluation") -> tuple[Tensor, Tensor]:
    """Window-averaged probabilities (N, C) and embeddings (N, D) of clips, on the CPU; the network's mode is restored.
    Torchrun's processes share the clips, as many each, some twice; every clip counts once."""
    settings, data, spec, console = job
    device, training, progress = next(network.parameters()).device, network.training, console.progress(label)
    part = math.ceil(len(clips) / WORLD)
    share = [clips[k % len(clips)] for k in range(RANK * part, (RANK + 1) * part)]
    loader = data.loader(share, spec, protocol, settings)
    prepare, scores, pooled = Prepare(spec.size).to(device), [], []
    network.eval()
    for step, (windows, boxes, counts) in enumerate(watch(loader, data.store), 1):
        parts = [network(prepare(views.to(device), box.to(device)))                                 # long clips have many
                 for views, box in zip(windows.split(64), boxes.split(64))]
        logits = torch.cat([part.logits for part in parts]).float()
        probabilities = logits.sigmoid() if data.tags else logits.softmax(1)
        embeddings = torch.cat([part.pooled for part in parts]).float()
        scores.append(torch.stack([p.mean(0) for p in probabilities.split(counts)]).cpu())
        pooled.append(torch.stack([p.mean(0) for p in embeddings.split(counts)]).cpu())
        progress(step, len(loader))
    network.train(training)
    return gather(torch.cat(scores))[:len(clips)], gather(torch.cat(pooled))[:len(clips)]

def final_metrics(job: Job, network: nn.Module) -> dict[str, float]:
    """The task's final protocol: consecutive windows of every clip; for retrieval, training clips are the gallery."""
    (scores, queries), data = predict(job, network, job.data.eval), job.data
    metrics = score(job.settings["task"], scores, data.labels(data.eval))
    if job.settings["task"] == "video_retrieval":
        _, gallery = predict(job, network, data.train, label="gallery")
        metrics = {**retrieval_metrics(queries, gallery, data.labels(data.eval), data.labels(data.train)), **metrics}
    return metrics

def mixup(*parts: Tensor) -> list[Tensor]:
    """Neighbours of a batch mixed at a random weight (arXiv 1710.09412): (2B, ...) -> (B, ...) of each. PANNs does it
    inside the network, behind its first normalisation; that embeddings are mixed as well is ours."""
    weights = torch.rand(len(parts[0]) // 2, device=parts[0].device)
    by_clip = [weights.view(-1, *[1] * (part.ndim - 1)) for part in parts]
    return [weight * part[0::2] + (1 - weight) * part[1::2] for weight, part in zip(by_clip, parts)]

def probe_of(job: Job, embeddings: Tensor) -> nn.Linear:
    """A linear probe on the training clips, or on 50,000 of them where there are more."""
    some = job.data.train[::math.ceil(len(job.data.train) / 50_000)]
    return linear_probe(embeddings[some], job.data.labels(some), len(job.data.classes))

def make_distiller(job: Job, method: str, teacher: Tensor | None) -> nn.Module | None:
    """What a method trains beside the student: the noise filter, a `Distiller` or nothing."""
    if teacher is None or method == "student":
        return None
    settings, sizes = job.settings, (len(job.data.classes), 8 * job.settings["width"])
    if method in ("mnf", "xmkd"):
        return ModalityNoiseFilter(*sizes, teacher_dim=teacher.shape[1]).to(settings["device"])
    probe = probe_of(job, teacher) if method == "kd" else None
    return Distiller(method, *sizes, teacher.shape[1], settings["csc_offset"], probe).to(settings["device"])

def train_epoch(job: Job, loader: Any, networks: tuple[nn.Module, nn.Module | None], optimizer: torch.optim.Optimizer,
                calibrate: bool, progress: Callable[[int], None]) -> dict[str, float]:
    """One pass over the loader -> mean of each loss term and of the gradient's largest entry. InputError: not finite."""
    settings, history, terms = job.settings, [], {}
    prepare = Prepare(job.spec.size, settings["spec_augment"]).to(settings["device"])
    for step, (views, boxes, _, *rest) in enumerate(watch(loader, job.data.store), 1):
        views, boxes, labels, embedding = (x.to(settings["device"], non_blocking=True) for x in (views, boxes, *rest))
        inputs = prepare(views, boxes)
        if settings["mixup"]:
            inputs, embedding, labels = mixup(inputs, embedding, labels)
        terms = train_step(*networks, optimizer, inputs, embedding, labels, settings["csc_offset"], settings["margin"],
                           settings["sparsity"], calibrate)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        terms["gradient"] = get_total_norm(gradients, math.inf)         # the largest; a loss can be finite without it
        history.append(torch.stack([*terms.values()]))
        progress(step)
    values = torch.stack(history).cpu()                                 # (steps, terms), brought over once an epoch
    if len(bad := (~values.isfinite()).any(1).nonzero()):
        step, sampler = int(bad[0]), loader.batch_sampler
        ids = [job.data.store.clips[i].id for i, _ in [*sampler][step]]
        raise InputError(f"loss or gradient is not finite in step {step + 1} of epoch {sampler.epoch}: "
                         f"{dict(zip(terms, values[step].tolist()))}; clips {', '.join(ids)}; lower --lr")
    return dict(zip(terms, values.mean(0).tolist()))

def take_up(out: Path, about: dict[str, Any], own: bool) -> dict[str, Any]:
    """With --resume, what last.pt holds if it is there, else {}; the log is cut to its epoch, half a line dropped.
    InputError if `own` settings differ from the saved ones where they must not."""
    settings, last, log = about["settings"], out / "last.pt", out / "log.jsonl"
    saved = load_checkpoint(last) if settings["resume"] and last.exists() else {}
    if saved and own:
        fewer = settings["epochs"] < saved["settings"]["epochs"]        # more is harmless
        pairs = {key: (saved[key], about[key]) for key in ("method", "seed", "classes", "network")}
        pairs |= {key: (saved["settings"].get(key), settings.get(key))
                  for key in [*(saved["settings"].keys() ^ settings.keys()), *settings]         # first what one has only
                  if key not in RUN_OPTIONS or (key == "epochs" and fewer)}
        for key, (old, new) in pairs.items():
            if old != new:
                raise InputError(f"--resume: {key} was {old!r} in {last} and is {new!r} now; keep it or change --out")
        now, then = about["teacher"], saved["teacher"]
        if len(now) != len(then) or not np.allclose(now, then, rtol=1e-3):
            raise InputError(f"--resume: {last} was trained with other teacher embeddings; give those or change --out")
    for name in () if saved else ("last.pt", "best.pt", "results.json"):
        (out / name).unlink(missing_ok=True)                            # an older run's must not be taken for this one's
    rows = log.read_text().splitlines(keepends=True) if saved and log.exists() else []
    save(log, "".join(row for row in rows if row.endswith("\n") and json.loads(row)["epoch"] <= saved["epoch"]))
    return saved

def fingerprint(teacher: Tensor | None) -> list[float]:
    """Numbers by which embeddings (N, D) are known again: shape, mean size of some 1,000; none without a teacher."""
    return [] if teacher is None else [*teacher.shape, teacher[::max(1, len(teacher) // 1000)].abs().mean().item()]

def set_up(job: Job, method: str, seed: int,
           teacher: Tensor | None) -> tuple[nn.Module, nn.Module, nn.Module | None, torch.optim.Adam]:
    """What a method trains, drawn from the seed: network, the same as `train_step` calls it, helper, optimizer."""
    settings = job.settings
    torch.manual_seed(seed)
    network = equip(make_network(job.spec.kind, len(job.data.classes), settings["width"]), settings)
    helper = make_distiller(job, method, teacher)
    filter_lr = 0.2 if isinstance(helper, ModalityNoiseFilter) else 1.0
    optimizer = make_optimizer(network, helper, settings["lr"], settings["weight_decay"], filter_lr)
    trained = distribute(network, helper, optimizer) if WORLD > 1 else network
    return network, trained, helper, optimizer

def fit(job: Job, method: str, seed: int, teacher: Tensor | None, out: Path) -> nn.Module:
    """Trains one network by one method; config.json, log.jsonl, best.pt and last.pt lie in `out` when it returns.
    An epoch's order, views and SpecAugment depend on seed and epoch alone: a run can be taken up after any of them."""
    settings, data, spec, console = job
    task, epochs, begun, first, best = settings["task"], settings["epochs"], time.time(), 1, -1.0
    network, trained, helper, optimizer = set_up(job, method, seed, teacher)
    rates = [group["lr"] for group in optimizer.param_groups]
    sizes = {"kind": spec.kind, "num_classes": len(data.classes), "width": settings["width"]}
    about = {"task": task, "method": method, "seed": seed, "classes": data.classes, "network": sizes,
             "settings": settings, "processes": WORLD, "teacher": fingerprint(teacher),
             "versions": {"xmkd": __version__, "torch": str(torch.__version__), "av": av.__version__}}
    own = spec.kind == STUDENT_KIND[task]                               # else a teacher: its settings name its folder
    name = method if own else "teacher"
    out.mkdir(parents=True, exist_ok=True)
    if saved := take_up(out, about, own):
        if saved["processes"] != WORLD:
            console.warn(f"resumed with {WORLD} processes after {saved['processes']}: results may differ a little")
        network.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        if helper is not None:
            helper.load_state_dict(saved["filter"])
        begun, first, best = begun - saved["seconds"], saved["epoch"] + 1, saved["best"]
    save(out / "config.json", about)
    board: Any = open_board(out, first, console) if settings["tensorboard"] and RANK == 0 else None
    loader = data.loader(data.train, spec, "train", settings, seed, teacher)
    show, steps = console.progress(f"{name} ({spec.kind}), seed {seed}"), len(loader)
    for epoch in range(first, epochs + 1):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * (0.1 if epoch > 0.75 * epochs else 1.0)                    # authors: after 150 of 200
        loader.batch_sampler.epoch, done = epoch, (epoch - first) * steps
        torch.manual_seed((1_000_003 * seed + epoch) * WORLD + RANK)
        losses = train_epoch(job, loader, (trained, helper), optimizer, method != "mnf",
                             lambda step: show(done + step, (epochs - first + 1) * steps))
        content = {**about, "epoch": epoch, "seconds": time.time() - begun, "student": network.state_dict(),
                   "filter": helper.state_dict() if helper is not None else {}}
        if epoch % settings["eval_every"] == 0 or epoch == epochs:
            metrics = score(task, predict(job, network, data.eval, "val")[0], data.labels(data.eval))
            row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], **losses, **metrics,
                   "seconds": round(time.time() - begun, 1)}
            if RANK == 0:
                with (out / "log.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
            for key, value in row.items() if board else []:
                board.add_scalar(key, value, epoch)
            if own:
                console.say(f"  {name} s{seed}  " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
            if metrics[CHECK_METRIC[task]] > best:
                best = metrics[CHECK_METRIC[task]]
                save(out / "best.pt", {**content, "metrics": metrics})
        save(out / "last.pt", {**content, "best": best, "optimizer": optimizer.state_dict()})
    if board:
        board.close()
    return network

def train_student(job: Job, method: str, seed: int, teacher: Tensor | None, out: Path) -> dict[str, Any]:
    """Trains, then evaluates the last and the best epoch by the task's final protocol -> results."""
    begun, settings = time.time(), job.settings
    network = fit(job, method, seed, teacher, out)
    last, saved = final_metrics(job, network), load_checkpoint(out / "best.pt")
    network.load_state_dict(saved["student"])
    return {"task": settings["task"], "data": settings["data"], "method": method, "seed": seed,
            "metrics": final_metrics(job, network), "epoch": saved["epoch"], "metrics_last": last,
            "seconds": round(time.time() - begun, 1), "clips": {"train": len(job.data.train), "eval": len(job.data.eval)}}

# ============================================== 10. Teacher
class KineticsTeacher(nn.Module):
    """torchvision's r2plus1d_18, Kinetics-400 weights, on ImageNet-normalised (B, 3, T, H, W); K = 1, D = 512."""
    def __init__(self) -> None:
        super().__init__()
        self.net = r2plus1d_18(weights=R2Plus1D_18_Weights.KINETICS400_V1, progress=sys.stdout.isatty())
        self.fc, self.net.fc = self.net.fc, nn.Identity()
        ours, theirs = Prepare(), R2Plus1D_18_Weights.KINETICS400_V1.transforms()
        mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (theirs.mean, theirs.std))
        self.scale, self.shift = nn.Buffer(ours.std / std), nn.Buffer((ours.mean - mean) / std)

    def forward(self, frames: Tensor) -> Features:
        """The logits are those of Kinetics-400."""
        pooled = self.net(frames * self.scale + self.shift)
        return Features(pooled[:, None], pooled, self.fc(pooled))

def restore(job: Job, option: str, saved: dict[str, Any]) -> nn.Module:
    """The network of the checkpoint that `option` names. InputError if its modality or its classes are not the data's."""
    checkpoint, task, classes = f"--{option} {job.settings[option]}", job.settings["task"], job.data.classes
    known, kind, count = saved["classes"], saved["network"]["kind"], saved["network"]["num_classes"]
    if option == "teacher":
        if kind != job.spec.kind:
            raise InputError(f"{checkpoint} is a network for {kind}; --task {task} needs one for {job.spec.kind}")
    elif classes != (known or classes) or len(classes) != count:
        named = f" ({', '.join(known[:3])}, ...)" if known else ""
        raise InputError(f"{checkpoint} knows {count} classes{named}, {job.settings['data']} has {len(classes)} "
                         f"({', '.join(classes[:3])}, ...); give --data with the classes that it was trained on")
    elif known is None and "predict" not in job.settings:               # the authors' or PANNs'
        job.console.warn(f"{checkpoint} does not name its classes; their order is taken to be {classes[0]}, ... "
                         f"{classes[-1]}; the authors' ActivityNet weights need their annotation.json in --data")
    network = equip(make_network(**saved["network"]), job.settings)
    network.load_state_dict(saved["student"])
    return network

def train_teacher(job: Job, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A network trained from scratch on nine tenths of the training clips, and its scores. The epoch best on the held-out
    tenth is kept: a network that has memorised its clips embeds their labels, not them."""
    task, seed, train = job.settings["task"], job.settings["seed"], job.data.train
    order = [train[i] for i in torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))]
    held, seen = order[:max(1, len(order) // 10)], order[max(1, len(order) // 10):]
    own = {**job.settings, "task": "audio_tagging" if task == "audio_tagging" else "action_recognition", "resume": True,
           "epochs": job.settings["teacher_epochs"], "eval_every": 1}
    job = job._replace(settings=own, data=job.data._replace(train=seen, eval=held))
    network = fit(job, "student", seed, None, folder)
    saved, metric = load_checkpoint(folder / "best.pt"), CHECK_METRIC[task]
    network.load_state_dict(saved["student"])
    known = final_metrics(job._replace(data=job.data._replace(eval=seen[:len(held)])), network)
    job.console.say(f"teacher {metric} {saved['metrics'][metric]:.3f} on {len(held)} training clips that it has not "
                    f"seen, {known[metric]:.3f} on as many that it has; epoch {saved['epoch']} of {own['epochs']}")
    return network, {"kind": "from scratch", "epoch": saved["epoch"], "held_out": saved["metrics"], "trained_on": known}

def find_features(folder: str | Path, clips: Sequence[Clip]) -> dict[str, str]:
    """Path of `<clip id>.npy` under `folder` by clip id; case does not count, nor folders where the name is unique."""
    last: Callable[[str], str] = lambda name: name.rpartition("/")[2]
    named = {os.path.splitext(os.path.relpath(path, folder))[0].lower(): path for path in walk_files(folder, ".npy")}
    ids = {clip.id: clip.id.lower() for clip in clips}
    files, owners = Counter(map(last, named)), Counter(map(last, ids.values()))
    by_last = {last(name): path for name, path in named.items() if files[last(name)] == 1 == owners[last(name)]}
    found = {key: named.get(name) or by_last.get(last(name)) for key, name in ids.items()}
    return {key: path for key, path in found.items() if path}

def read_features(paths: Sequence[str]) -> Tensor:
    """Embeddings (n, D) from n NumPy files of shape (D,). Raises InputError naming the file; no code in it is run."""
    rows: list[Tensor] = []
    for path in paths:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)              # its shape is known before it is read
            if array.ndim != 1 or not array.size or (rows and len(array) != len(rows[0])):
                raise ValueError(f"{array.shape}; expected ({len(rows[0]) if rows else 'D'},), one embedding a clip")
            if array.dtype.kind not in "fiu" or not np.isfinite(array := array.astype(np.float32)).all():
                raise ValueError(f"{array.dtype}; expected real numbers, all finite")
            rows.append(torch.from_numpy(array))
        except Exception as error:                                      # a dozen kinds, by what is wrong with the file
            raise InputError(f"{path}: no embedding ({error}); pickled arrays are refused") from error
    return torch.stack(rows)

def embed_teacher(job: Job, folder: Path, network: nn.Module | None, reason: str) -> dict[str, Any]:
    """What `run_teacher` returns; the teacher is `network`, else --teacher's file, else trained in `folder`: `reason`."""
    settings, data, spec, console = job
    if reason and not network:
        console.warn(f"{reason}; the teacher is trained from scratch and weaker; --teacher FILE takes a better one")
    if "explain" in settings:
        console.warn(f"the checkpoint's teacher is not in {folder.parent}; it is made anew; --cache names the run's")
    if network:
        known, info = False, {"kind": "torchvision r2plus1d_18, Kinetics-400"}          # known: are the classes to it?
        network = equip(network, settings)
    elif (choice := settings["teacher"]) not in ("auto", "scratch"):
        saved, info = load_checkpoint(choice), {"kind": f"checkpoint {choice}"}
        network, known = restore(job, "teacher", saved), saved["classes"] == data.classes
    else:
        (network, info), known = train_teacher(job, folder), True
    jobs = [(i, (spec.kind,)) for i in data.eval]
    decoded = data.store.decode(jobs, settings["workers"], console.progress("decoding"))
    shared = [i for i, *_, problem in decoded if not problem]
    scores, found = predict(job, network, data.train + shared, label="teacher embeddings")
    pooled = torch.zeros(len(data.store.clips), found.shape[1])
    pooled[data.train + shared] = found
    return {"pooled": pooled, "shared": shared, "info": info, "scores": scores[len(data.train):] if known else None}

def run_teacher(job: Job, cache: Path) -> dict[str, Any]:
    """`pooled` (N, D): the teacher's embeddings of the training clips and the `shared` evaluation clips that have its
    modality, else zeros; `scores` of the latter, if it knows the classes; `info`. A file in `cache`, memory-mapped."""
    settings, data, spec, console = job
    choice, reason = settings["teacher"], ""
    network: nn.Module | None = None
    if choice == "auto" and settings["data"] != "demo":
        reason = "torchaudio has no pretrained tagging network"
        if spec.kind == "video":
            try:
                network = KineticsTeacher() if RANK == 0 else None
            except (OSError, RuntimeError) as error:                    # no network, or half a download
                reason = f"torchvision's r2plus1d_18 cannot be had ({error})"
        if agree(network is not None):
            network = network or KineticsTeacher()                      # process 0 has downloaded it
    file = choice not in ("auto", "scratch")
    source = hashlib.sha256(Path(choice).read_bytes()).hexdigest() if file else "Kinetics-400" if network else choice
    needs = [settings[name] for name in ("task", "seed", "teacher_epochs", "batch_size", "lr", "weight_decay", "width",
                                         "spec_augment", "mixup", "class_balanced", "amp")]
    files = [[data.store.key(i, spec.kind) for i in part] for part in (data.train, data.eval)]
    labels = [data.store.clips[i].labels for i in data.train]
    folder = cache / f"teacher-{digest(source, spec, needs, files, labels, data.classes, data.train, data.eval)}"
    folder = agree(folder)
    if not agree((folder / "embeddings.pt").exists()):
        with locked(folder, console.say):                               # a run that shares the cache may be making it
            if not agree((folder / "embeddings.pt").exists()):
                save(folder / "embeddings.pt", embed_teacher(job, folder, network, reason))
    return torch.load(folder / "embeddings.pt", weights_only=True, mmap=True)

def embed_clips(job: Job, cache: Path) -> tuple[Tensor, dict[str, Any]]:
    """Teacher embeddings (N, D) for a student's job, zeros where there is none; what it is, its score in `metrics`."""
    settings, data, spec, _ = job
    if folder := settings.get("teacher_features"):
        files, clips = find_features(folder, data.store.clips), data.store.clips
        shared = [i for i in data.eval if clips[i].id in files]
        found = read_features([files[clips[i].id] for i in data.train + shared])
        embeddings = torch.zeros(len(clips), found.shape[1])
        embeddings[data.train + shared] = found
        kept: dict[str, Any] = {"info": {"kind": f"embeddings {folder}"}, "scores": None}
    else:
        kept = run_teacher(job._replace(spec=spec._replace(kind="audio" if spec.kind == "video" else "video")), cache)
        embeddings, shared = kept["pooled"], kept["shared"]
    info, scores = kept["info"], kept["scores"]
    if shared and scores is None:                                       # it has other classes or none
        scores, info["scored_by"] = probe_of(job, embeddings)(embeddings[shared]), "a linear probe on its embeddings"
    return embeddings, {**info, "metrics": score(settings["task"], scores, data.labels(shared))} if shared else info

# ============================================== 11. Predicting and explaining
def predict_files(settings: dict[str, Any], saved: dict[str, Any]) -> None:
    """What --predict does: prints the likeliest classes of each file or, with --gallery, the clips nearest to it.
    Raises InputError if there is nothing to look at, and after the last file if any of them could not be used."""
    kind, console = saved["network"]["kind"], Console(settings["quiet"] or settings["json"])
    def listed(paths: Sequence[str]) -> list[str]:
        found = [file for path in paths for file in (walk_media(path) if os.path.isdir(path) else [path])
                 if kind == "audio" or not is_sound_only(file) or file in paths]
        if paths and not found:
            raise InputError(f"no media file with {kind} under {', '.join(paths)}")
        return found
    files, gallery = listed(settings["predict"]), listed([settings["gallery"]] if "gallery" in settings else [])
    names = saved["classes"] or [f"class {k}" for k in range(saved["network"]["num_classes"])]
    with tempfile.TemporaryDirectory() as folder:
        store = open_store("files", settings, Path(folder if settings["no_cache"] else settings.get("cache", folder)),
                           [Clip(file, (0,), "eval", file, file) for file in files + gallery])
        job = Job(settings, Data(store, names, settings["task"] == "audio_tagging", [], []), view_spec(settings), console)
        network = restore(job, "checkpoint", saved)
        jobs = [(i, (kind,)) for i in range(len(store.clips))]
        reasons = [reason for *_, reason in store.decode(jobs, settings["workers"], console.progress("decoding"))]
        good = [i for i, reason in enumerate(reasons) if not reason]
        scores, embeddings = predict(job, network, good, label="predicting") if good else (torch.zeros(0, 0),) * 2
    if gallery:
        if bad := [*filter(None, reasons[len(files):])]:
            console.warn(f"{len(bad)} clips are left out of the gallery; the first: {bad[0]}")
        if len(bad) == len(gallery):
            raise InputError(f"--gallery {settings['gallery']} holds no clip with {kind} that can be read")
        queries, names = sum(i < len(files) for i in good), [store.clips[i].id for i in good if i >= len(files)]
        scores = cosine_matrix(embeddings[:queries], embeddings[queries:])
    results, rows = list[dict[str, Any]](), iter(scores)
    for file, reason in zip(files, reasons):
        if reason:
            results.append({"file": file, "error": reason.removeprefix(f"{file}: ")})
        else:
            order = zip(*map(Tensor.tolist, next(rows).sort(descending=True)))
            top = [{"name": names[k], "score": round(value, 6)} for value, k in order
                   if not gallery or os.path.realpath(names[k]) != os.path.realpath(file)]
            results.append({"file": file, "top": top[:settings["topk"]]})
        if not settings["json"]:
            lines = [f"error: {results[-1]['error']}"] if reason else [
                f"{best['score']:.3f}  {best['name']}" for best in results[-1]["top"]]
            print(console.clear + file, *lines, sep="\n  ")
    if settings["json"]:
        print(json.dumps(results, indent=2))
    if failed := sum("error" in result for result in results):
        raise InputError(f"{failed} of {len(files)} files could not be used; the checkpoint is one for {kind}")

def heat(values: Tensor) -> Tensor:
    """Numbers 0..1 (..., H, W) as colours from black over red and yellow to white: (..., 3, H, W) in 0..1."""
    return (3 * values.unsqueeze(-3) - torch.arange(3.0).view(3, 1, 1)).clamp(0, 1)

def pile(*parts: str | Tensor, width: int = 1056) -> Tensor:
    """Pictures (3, h, w) and wrapped texts, one below the other on white: (3, H, W) in 0..1. The font, torchvision's at
    twice its size, knows Latin letters without accents only."""
    pictures = list[Tensor]()
    for part in parts:
        if isinstance(part, str):
            lines = [piece.replace(" ", "  ") for line in part.splitlines()             # its spaces are narrow
                     for piece in textwrap.wrap(line, width // 11, subsequent_indent=" " * 3)]
            canvas = torch.full((3, 14 * len(lines), width // 2), 255, dtype=torch.uint8)
            drawn = draw_bounding_boxes(canvas, torch.zeros(1, 4), ["\n".join(lines)], "white", label_colors="black")
            part = F.interpolate(drawn[None] / 255, scale_factor=2)[0]
        pictures.append(part)
    widest = max(picture.shape[2] for picture in pictures)
    return torch.cat([F.pad(picture, (0, widest - picture.shape[2], 0, 10), value=1.0) for picture in pictures], dim=1)

def draw_attention(inputs: Tensor, attention: Tensor, width: int = 1056) -> Tensor:
    """What a student sees of a clip, above the same under the attention (K,) on it: (3, H, width) in 0..1.

    inputs  frames (3, T, S, S) or log-mel (T, 64), as `Prepare` makes them. A square is a position of the student's map;
            orange has an even share of the attention, black none, white twice that or more."""
    if inputs.ndim == 4:
        frames, side = inputs.shape[1:3]
        pictures = (inputs * Prepare().std + Prepare().mean).transpose(0, 1)
        weights = attention.view(math.ceil(frames / 8), math.ceil(side / 16), math.ceil(side / 16))
        weights = F.interpolate(weights[None, None], scale_factor=(8, 16, 16))[0, 0, :frames, :side, :side]
        size = (width // max(4, min(8, frames)) - 4,) * 2
    else:                                                               # low pitch below
        inputs = inputs[:len(inputs) // 16 * 16]                        # pooling leaves the rest out
        spread = (inputs.max() - inputs.min()).clamp_min(1e-6)          # 0 in silence
        pictures = ((inputs - inputs.min()) / spread).T.flip(0).expand(1, 3, -1, -1)
        weights, size = attention.view(1, -1, inputs.shape[1] // 16).transpose(1, 2).flip(1), (256, width - 4)
    weights = F.interpolate((weights * len(attention) / 2).clamp_max(1)[None, None], (len(pictures), *size))[0, 0]
    pictures = F.interpolate(pictures, size)
    shaded = 0.4 * pictures.mean(1, keepdim=True) + 0.6 * heat(weights)
    return pile(*(make_grid(row, min(8, len(row)), pad_value=1.0) for row in (pictures, shaded)))

class Seen(NamedTuple):
    """What student and filter make of clips, on the CPU."""
    inputs: Tensor       # (B, ...) of the student
    logits: Tensor       # (3, B, C) of the student, of the filter asking with the teacher as it is and with it purified
    gate: Tensor         # (B, D)
    attention: Tensor    # (B, K) of the purified teacher
    similarity: Tensor   # (B, B) cosine of student and purified teacher

@torch.no_grad()
def look(job: Job, student: nn.Module, noise_filter: ModalityNoiseFilter, teacher: Tensor, clips: Sequence[int]) -> Seen:
    """Student and filter, in evaluation mode, on the first view of each clip."""
    device, views = job.settings["device"], Views(job.data, job.spec, "val")
    student.eval(), noise_filter.eval()
    frames, boxes, *_ = join_views([tuple(part[:1] for part in views[i, 0]) for i in clips])
    inputs, embedding = Prepare(job.spec.size).to(device)(frames.to(device), boxes.to(device)), teacher[clips].to(device)
    features = student(inputs)
    filtered, raw = noise_filter(embedding, features.map), noise_filter.adapter(embedding)[:, None]
    evidence = noise_filter.trans_sv(noise_filter.attn(raw, features.map, features.map)[0][:, 0])
    logits = torch.stack([features.logits, noise_filter.sv_cls_classifier(evidence), filtered.logits])
    similarity = cosine_matrix(features.pooled, filtered.teacher)
    return Seen(*(x.cpu() for x in (inputs, logits, filtered.gate, filtered.attention, similarity)))

def draw_clip(job: Job, seen: Seen, clip: Clip) -> Tensor:
    """A clip, seen alone: labels, predictions of student and filter, the gate's channels, where the attention lies."""
    data, settings, gate = job.data, job.settings, seen.gate[0]
    def top(values: Tensor, names: Sequence[Any], count: int) -> str:
        best = values.topk(min(count, len(values)))
        return ", ".join(f"{names[k]:.32} {value:.2f}" for value, k in zip(*map(Tensor.tolist, best)))
    lines = [settings["checkpoint"], f"{clip.id}: {', '.join(data.classes[k] for k in clip.labels)}"]
    if settings["data"] == "demo":
        shown, mixed = demo_truth(clip, settings["seed"], settings["noise"], settings["mismatch"])
        lines.append("its teacher modality holds " + (", ".join(data.classes[k] for k in shown) or "nothing")
                     + "".join(f"; mixed in: {data.classes[k]}" for k in mixed))
    scores = seen.logits[:, 0].sigmoid() if data.tags else seen.logits[:, 0].softmax(1)
    names, channels = ("student", "filter, teacher as it is", "filter, teacher purified"), [*map(str, range(len(gate)))]
    lines += [*(f"{name}:  {top(row, data.classes, 3)}" for name, row in zip(names, scores)),
              f"similarity of student and purified teacher:  {seen.similarity.item():.2f}",
              f"gate, {gate.mean():.2f} open on average:  most open channels {top(gate, channels, 4)}",
              f"most closed channels {top(-gate, channels, 4).replace('-', '')}; all of them, black 0, white 1:"]
    return pile("\n".join(lines), F.interpolate(heat(gate[None])[None], (24, 1056))[0],
                draw_attention(seen.inputs[0], seen.attention[0]), "above: the view; below: the purified teacher's "
                "attention; black none, orange an even share, white twice it")

def draw_batch(job: Job, seen: Seen, labels: Tensor, calibrate: bool) -> Tensor:
    """The batch's matrices side by side: one sees which pairs are softened."""
    offset, overlap, panels = job.settings["csc_offset"], label_overlap(labels), []
    temperature = seen.similarity.clamp_min(0) * calibrate + offset
    own, sharing = torch.eye(len(overlap)).bool(), overlap > 0
    kinds = {"own pair": own, "other pairs that share a label": sharing & ~own, "the rest": ~sharing}
    means = [f"{name} {seen.similarity[mask].mean():.2f}" for name, mask in kinds.items() if mask.any()]
    for title, values, most in (("similarity", seen.similarity.clamp(0, 1), 1), ("temperature", temperature, 1 + offset),
                                ("label overlap", overlap, 1)):
        picture = F.interpolate(heat(values / most)[None], (342, 342))[0]
        panels.append(F.pad(pile(f"{title} (0 to {most:g})", picture, width=342), (0, 10), value=1.0))
    text = (f"{len(overlap)} clips sorted by class; rows: student, columns: purified teacher; black 0, white highest\n"
            f"mean similarity: {'; '.join(means)}\nbright temperature: the pair is softened; dark: it is sharpened")
    return pile(text, torch.cat(panels, dim=2))

def draw_groups(groups: dict[str, Tensor], measures: dict[str, Tensor]) -> tuple[str, Tensor]:
    """How groups of clips, masks (N,), differ in measures (N,): in words, and the same with histograms (3, H, 1056)."""
    parts, first = list[str | Tensor](), next(iter(groups.values()))
    for measure, values in measures.items():
        low, high = values.min().item(), values.max().item()
        parts.append(f"{measure}, {low:.2f} to {high:.2f}")
        for name, mask in groups.items():
            mean, deviation = values[mask].mean(), values[mask].std(correction=0)
            text = f"  {name:18} {int(mask.sum()):>5} clips  {mean:.3f} ± {deviation:.3f}"
            if mask is not first:
                chance = mean_auc(values[first | mask][:, None], first[first | mask][:, None])
                text += f"  lower than one of the first group with chance {chance:.2f}"
            counts = torch.histc(values[mask], 44, low, high)
            bars = torch.linspace(1, 0, 40)[:, None] >= counts / counts.max()                # black on white
            parts += [text, F.interpolate(bars.float().expand(1, 3, -1, -1), (40, 1056))[0]]
    return "\n".join(part for part in parts if isinstance(part, str)), pile(*parts)

def explain(job: Job, saved: dict[str, Any], cache: Path, out: Path) -> None:
    """What --explain does: a sheet for each of N clips, one of a batch's matrices, one that compares groups of clips."""
    settings, data, _, console = job
    source, clips, folder = settings["checkpoint"], data.store.clips, out / "explain"
    student = restore(job, "checkpoint", saved)
    teacher, _ = embed_clips(job, cache)
    noise_filter: Any = make_distiller(job, saved["method"], teacher)
    try:
        noise_filter.load_state_dict(saved["filter"])
    except RuntimeError as error:
        raise InputError(f"the filter in {source} does not fit embeddings of {teacher.shape[1]} numbers; give --teacher "
                         "or --teacher-features as it was trained with") from error
    if "teacher" in saved and not np.allclose(fingerprint(teacher), saved["teacher"], rtol=1e-3):
        console.warn(f"{source} was trained with other teacher embeddings than these; the sheets show little then")
    see = partial(look, job, student, noise_filter, teacher)
    usable = [i for i in data.eval if teacher[i].any()]                 # the others lack the teacher's modality
    if not usable:
        raise InputError(f"no evaluation clip of {settings['data']} has the teacher's modality; there is nothing to draw")
    def some(chosen: Sequence[int], most: int) -> list[int]:
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:most]
        return [chosen[k] for k in order.sort().values]
    folder.mkdir(exist_ok=True)
    drawn, batch = some(usable, settings["explain"]), sorted(some(usable, 32), key=lambda i: clips[i].labels)
    for i in drawn:
        save_image(draw_clip(job, see([i]), clips[i]), folder / f"clip-{clips[i].id.replace('/', '_')}.png")
    save_image(draw_batch(job, see(batch), data.labels(batch), saved["method"] == "xmkd"), folder / "batch.png")
    if settings["data"] == "demo":                      # which knows the truth; its evaluation clips all match
        many = some(data.train, 500)
        truth = [demo_truth(clips[i], settings["seed"], settings["noise"], settings["mismatch"]) for i in many]
        matched = torch.tensor([shown == [*clips[i].labels] for i, (shown, _) in zip(many, truth)])
        noisy = torch.tensor([bool(mixed) for _, mixed in truth])
        groups = {"matched and clean": matched & ~noisy, "matched and noisy": matched & noisy, "mismatched": ~matched}
    else:
        many = some(data.train, 250) + some(usable, 250)
        train = torch.tensor([clips[i].split == "train" for i in many])
        groups = {"training clips": train, "evaluation clips": ~train}
    parts = (see(many[k:k + 64]) for k in range(0, len(many), 64))
    openness, similarity = torch.cat([torch.stack([x.gate.mean(1), x.similarity.diag()]) for x in parts], dim=1)
    table, picture = draw_groups({name: mask for name, mask in groups.items() if mask.any()}, {
        "openness of the gate": openness, "similarity of student and teacher": similarity})
    save_image(picture, folder / "groups.png")
    console.say(f"{table}\n{len(drawn)} clip sheets, batch.png and groups.png are in {folder}")

# ============================================== 12. Run support
class Console:
    """Lines for people, on stdout; warnings on stderr, kept for results.json. Progress rewrites one line on a terminal,
    is a line every 20 s elsewhere; `quiet` mutes all but warnings."""
    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self.terminal, self.warnings = quiet or RANK > 0, sys.stdout.isatty(), list[str]()
        self.clear = "\r\x1b[K" if self.terminal else ""

    def say(self, text: str) -> None:
        if not self.quiet:
            print(self.clear + text, flush=True)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        if RANK == 0:
            print(f"{self.clear}warning: {text}", file=sys.stderr, flush=True)

    def progress(self, label: str) -> Callable[[int, int], None]:
        """A function of (done, total) that shows the share done and the time left."""
        begun = shown = time.time()
        def show(done: int, total: int) -> None:
            nonlocal shown
            now = time.time()
            if not self.quiet and now - shown > (0.2 if self.terminal else 20):
                shown, left = now, round((now - begun) / done * (total - done))
                print(f"{self.clear}  {label}: {done:,} of {total:,} ({done / total:.0%}), {left // 60} min "
                      f"{left % 60:02} s left", end="" if self.terminal else "\n", flush=True)
        return show

def open_board(folder: Path, first: int, console: Console) -> Any:
    """A TensorBoard writer for the epochs from `first` on; None, with a warning, where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(str(folder), purge_step=first)
    except ImportError as error:
        console.warn(f"no curves: {error}; pip install tensorboard; the numbers are in {folder / 'log.jsonl'} anyway")
        return None

def write(path: Path, content: Any) -> None:
    """Text, JSON, for .npy an array, for .pt tensors and plain Python; written beside, flushed, renamed: never half a
    file. Raises OSError that names the path and the space left."""
    part = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            if path.suffix == ".pt":
                torch.save(content, file)
            elif path.suffix == ".npy":
                np.save(file, content)
            else:
                file.write((content if isinstance(content, str) else json.dumps(content, indent=2) + "\n").encode())
            file.flush()
            if path.suffix != ".npy":                                   # the cache notices what a power cut leaves
                os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:                            # RuntimeError: what torch.save makes of it
        free = shutil.disk_usage(path.parent).free / 1e6
        raise OSError(f"{path} cannot be written, {free:,.1f} MB are free there ({error})") from error
    finally:
        part.unlink(missing_ok=True)                                    # there if the disk is full or the run was stopped

def save(path: Path, content: Any) -> None:
    """`write` for all: under torchrun process 0 does it and the others wait."""
    if RANK == 0:
        write(path, content)
    if WORLD > 1:
        dist.barrier()

@contextmanager
def locked(folder: Path, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Makes the folder and holds it until the block or the process ends. If another run holds it: tells `say` and waits;
    without `say` InputError."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            if RANK == 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if say is None:
                raise InputError(f"{folder} is being written by another run; wait for it or give another --out") from None
            say(f"waits for another run, which is at work in {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield

def agree(value: Any) -> Any:
    """Process 0's value in all of torchrun's."""
    box = [value]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]

def equip(network: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """A network on the run's device, computing as --amp and --compile say; linear layers and results stay float32."""
    network = network.to(settings["device"])
    if settings["amp"] == "bf16":
        kind = torch.device(settings["device"]).type
        for layer in [layer for layer in network.modules() if isinstance(layer, nn.Linear)]:
            whole = torch.autocast(kind, enabled=False)(layer.forward)  # scores of 8 bits tie, which costs mAP
            layer.forward = lambda x, whole=whole: whole(x.float())  # type: ignore[method-assign, misc]
        forward = torch.autocast(kind, torch.bfloat16)(network.forward)
        network.forward = lambda inputs: Features(*(part.float() for part in forward(inputs)))
    if settings["compile"]:
        network.compile()
    return network

def synced_batch_norm(norm: Any, x: Tensor) -> Tensor:
    """Batch normalisation by the statistics of all processes' parts, where nn.SyncBatchNorm has no kernel (CPU)."""
    if not norm.training:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    x, dtype = x.to(norm.weight.dtype), x.dtype
    axes, column, n = [0, *range(2, x.ndim)], (-1, *[1] * (x.ndim - 2)), x.numel() // x.shape[1] * WORLD
    mean = AllReduce.apply(x.mean(axes)) / WORLD
    variance = AllReduce.apply((x - mean.view(column)).square().mean(axes)) / WORLD
    norm.running_mean.lerp_(mean.detach(), norm.momentum)
    norm.running_var.lerp_(variance.detach() * n / (n - 1), norm.momentum)
    norm.num_batches_tracked += 1
    scale = norm.weight * (variance + norm.eps).rsqrt()
    return ((x - mean.view(column)) * scale.view(column) + norm.bias.view(column)).to(dtype)

def distribute(network: nn.Module, helper: nn.Module | None, optimizer: torch.optim.Optimizer) -> nn.Module:
    """Under torchrun: the network as one of several that train as one; the helper, whole in each, is kept the same."""
    warnings.filterwarnings("ignore", "Grad strides do not match")      # of 1 x 1 kernels; harmless
    device = next(network.parameters()).device
    if device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for norm in [m for m in network.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))]:
        norm.forward = partial(synced_batch_norm, norm)  # type: ignore[method-assign]
    def average(*_: Any) -> None:                                       # each has the whole gradient, to rounding
        for parameter in helper.parameters() if helper is not None else []:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= WORLD
    optimizer.register_step_pre_hook(average)
    return nn.parallel.DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)

def network_of(state: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of `make_network` that a state dict fits. KeyError if it is of another family."""
    stages = [state[key] for i in range(1, 7) if (key := f"conv_block{i}.conv1.weight") in state]
    if stages:
        return {"kind": "audio", "num_classes": len(state["fc_audioset.weight"]), "width": len(stages[0]),
                "stages": len(stages), "dim": len(state["fc1.weight"])}
    blocks = [len({key.split(".")[2] for key in state if key.startswith(f"conv{i}.blocks.")}) + 1 for i in range(2, 6)]
    return {"kind": "video", "num_classes": len(state["cls.weight"]), "width": len(state["conv1.temporal_conv.weight"]),
            "blocks": blocks}

def check_fit(network: dict[str, Any], state: dict[str, Tensor], room: int) -> None:
    """An error naming the key if a state dict is not that of the network, in finite numbers of at most `room` bytes.
    It takes no memory: a tensor of any shape may repeat one number, a network have any arguments."""
    for key, value in state.items():
        real = isinstance(value, Tensor) and (value.is_floating_point() or key.endswith("num_batches_tracked"))
        if not real or value.layout != torch.strided:
            raise ValueError(f"{key} holds {getattr(value, 'dtype', type(value))}, not dense floats")
        room -= value.nbytes
        if room < 0:
            raise ValueError(f"{key} of shape {tuple(value.shape)} has more numbers than the file")
        if not value.isfinite().all():
            raise ValueError(f"{key} holds numbers that are infinite, or none at all (NaN)")
    fitting = network_of(state)
    if {**fitting, **network} != fitting:
        raise ValueError(f"`network` asks for {network}, but the weights are those of {fitting}")
    with torch.device("meta"):
        make_network(**network).load_state_dict(dict(state), assign=True)     # a copy: `assign` sticks to its metadata

def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of this program, the authors or PANNs, on the CPU; no code in the file is run. Raises InputError.

    Keys: `student` (state dict for VideoNet or AudioNet), `filter` (for ModalityNoiseFilter; empty without one),
    `network` (arguments of `make_network`), `task`, `method`, `seed`, `classes`, `settings`, `versions`, `epoch`; of
    others' checkpoints `task` and `classes` are None. The authors' pickled schedulers are let in by class and dropped."""
    bases = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
    known = [value for module in (torch.optim, torch.optim.lr_scheduler) for value in vars(module).values()
             if isinstance(value, type) and issubclass(value, bases)]
    plain: Any = (lambda factory: OrderedDict(), "collections.defaultdict")     # the loader fills no defaultdict
    problem = "no readable checkpoint"
    try:
        room = os.path.getsize(path)
        if zipfile.is_zipfile(path) and (size := sum(part.file_size for part in zipfile.ZipFile(path).infolist())) > room:
            raise ValueError(f"its parts are compressed and would take {size / 1e6:,.0f} MB; torch.save does not do that")
        with torch.serialization.safe_globals([*known, Counter, dict, plain]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        problem = "no checkpoint of this program, the paper's authors or PANNs"
        if {"student", "network", "classes", "task"} <= content.keys():
            check_fit(content["network"], content["student"], room)
            for key, kind in {"settings": dict, "filter": dict, "classes": list, "task": str, "seed": int}.items():
                if not isinstance(content[key], kind):
                    raise TypeError(f"{key} holds {content[key]!r:.50}, no {kind.__name__}")
            return content
        if len(content.get("model", {}).get("logmel_extractor.melW", range(513))) != 513:
            raise KeyError("its log-mel is for another sample rate than 32 kHz")
        states = (content.get("state_dict", content.get("model")), content.get("audio_state_dict", {}))
        student, noise_filter = ({key.replace("module.", "").replace("_orig_mod.", ""): state[key] for key in state
                                  if "_extractor." not in key} for state in states)     # those of PANNs' log-mel
        check_fit(network := network_of(student), student, room)
        return {"student": student, "filter": noise_filter, "network": network, "task": None, "classes": None,
                "method": "xmkd" if noise_filter else "student", "seed": 3, "settings": {}, "versions": {},
                "epoch": content.get("epoch", content.get("iteration", 0))}
    except Exception as error:                                          # a dozen kinds, by what is wrong with the file
        reason = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split())
        raise InputError(f"{path} is {problem}: {reason[:300]}") from error

def digest(*parts: Any) -> str:
    """Sixteen hexadecimal digits that change when any of the parts does."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]

# ============================================== 13. Arguments and main
def number(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """An argparse type: a number from low to high."""
    def parse(text: str) -> Any:
        with suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text} is not {what} from {low:g} to {high:g}")
    return parse

SHARE, COUNT, FLAG = number(float, 0, 1), number(int, 1, 10 ** 6), {"action": argparse.BooleanOptionalAction}
OPTIONS: dict[str, list[tuple[str, Any, Any, str]]] = {         # name, default, type, choices or argparse settings, help
    "task and data": [
        ("task", "audio_tagging", list(STUDENT_KIND), "what the student learns"),
        ("data", "demo", str, "'demo' or a folder: AudioSet, UCF-101, ActivityNet, VGGSound, the authors' release, or "
         "train/<label>/* and val/<label>/*"),
        ("split", "balanced", ["balanced", "unbalanced", "all"], "training list of AudioSet"),
        ("fold", 1, number(int, 1, 3), "split of UCF-101, 1 to 3"),
        ("noise", 0.3, SHARE, "demo: share of clips whose teacher modality has irrelevant events mixed in"),
        ("mismatch", 0.2, SHARE, "demo: share of training clips whose teacher modality shows other events or none"),
        ("max-skipped", 0.2, SHARE, "largest share of unreadable clips to go on with")],
    "views": [
        ("frames", 16, COUNT, "frames a view (authors)"),
        ("size", 112, number(int, 16, 4096), "side of the square view, pixels (authors)"),
        ("fps", 4.0, number(float, 0.01, 240), "frames a second (authors)"),
        ("seconds", 10.0, number(float, 0.4, 3600), "sound a view, seconds (PANNs); less if all clips are shorter"),
        ("crop-area", 0.25, number(float, 0.01, 1), "smallest area of a training crop, share of the frame (authors)"),
        ("flip", True, FLAG, "mirror half of the training views (authors); not where left and right matter"),
        ("strong", False, FLAG, "grey views, in training also inverted and rotated (ours); for small data sets"),
        ("spec-augment", True, FLAG, "mask stripes of training spectrograms (PANNs)"),
        ("mixup", False, FLAG, "mix pairs of clips: log-mel, tags, embeddings (PANNs; audio tagging)"),
        ("class-balanced", None, FLAG, "draw a class, then one of its clips (PANNs; default: for the unbalanced list)")],
    "method": [
        ("method", None, METHODS, "xmkd (default): MNF + CSC; mnf: MNF with a constant temperature; csc: CSC on the "
         "unfiltered teacher; student: no teacher; kd, fitnet, crd, ccl: other distillation methods"),
        ("compare", None, str, "methods to train from the same seeds and teacher, such as student,mnf,csc,xmkd, or "
         "'paper' for all (default on the demo: student,xmkd)"),
        ("teacher", "auto", str, "auto: the public pretrained network where it can be had, else one from scratch; "
         "scratch; or FILE, a checkpoint of the other modality, ours, the authors' or PANNs'"),
        ("teacher-features", None, str, "folder with an embedding (D,) a clip, <clip id>.npy, in place of a teacher"),
        ("teacher-epochs", 60, COUNT, "epochs of a teacher from scratch (ours)"),
        ("csc-offset", 0.07, number(float, 1e-6, 10), "makes the temperature: similarity + offset (authors)"),
        ("margin", 0.2, number(float, 0, 2), "margin of the triplet term, cosine (authors)"),
        ("sparsity", 1e-3, SHARE, "weight of the filter's L1 term (authors)"),
        ("width", 64, number(int, 2, 1024), "channels of the first stage; D is 8 times that (authors)")],
    "optimisation": [
        ("epochs", 200, COUNT, "passes over the training clips, the last quarter at a tenth of the rate (authors)"),
        ("batch-size", 32, number(int, 2, 10 ** 6), "clips a step, of all processes together (authors)"),
        ("lr", 3e-4, number(float, 0, 10), "Adam's rate for the student, a fifth of it for the filter (authors)"),
        ("weight-decay", 5e-4, SHARE, "Adam's coupled L2 (authors)"),
        ("eval-every", 5, COUNT, "epochs between evaluations (authors)")],
    "instead of training": [
        ("eval", None, str, "a checkpoint to evaluate: ours, the authors' or PANNs'"),
        ("predict", None, {"nargs": "+", "metavar": "FILE"}, "media files or folders of them: prints the likeliest "
         "classes; needs --checkpoint"),
        ("gallery", None, str, "with --predict: a folder of media, whose clips nearest to each file are printed"),
        ("topk", 5, COUNT, "with --predict: how many classes or clips a file"),
        ("json", False, FLAG, "with --predict: prints JSON"),
        ("explain", None, COUNT, "draw what filter and calibration do to so many clips; needs --checkpoint"),
        ("checkpoint", None, str, "the checkpoint that --predict and --explain use, as for --eval"),
        ("benchmark", False, FLAG, "measure loader and training step at the given sizes")],
    "run": [
        ("seed", 3, number(int, 0, 10 ** 6), "first seed (authors)"),
        ("seeds", 1, COUNT, "how many seeds to run, counted up from --seed"),
        ("out", None, str, "run folder (default: runs/<task>-<data>-<method>-s<seed>)"),
        ("cache", None, str, "folder of decoded clips and teachers, may be shared by runs (default: <out>/cache)"),
        ("raw-cache", False, FLAG, "keep frames as they are, not as JPEG: 9 to 25 times the space, faster"),
        ("no-cache", False, {"action": "store_true"}, "keep no decoded clip, decode it again for every view"),
        ("resume", False, FLAG, "go on from <out>/last.pt if there is one"),
        ("workers", min(8, (os.cpu_count() or 2) // 2), number(int, 0, 256), "loader processes"),
        ("device", "auto", str, "cpu, cuda, cuda:1, ...; auto takes the GPU where there is one"),
        ("amp", "auto", ["auto", "bf16", "none"], "precision of the networks only; auto: bf16 on a GPU with it"),
        ("deterministic", False, FLAG, "the same numbers from every run on one GPU, slower; on a CPU they are anyway"),
        ("compile", False, FLAG, "torch.compile the networks: slow to start, faster from then on"),
        ("tensorboard", False, FLAG, "curves for TensorBoard in the run folder, if that is installed"),
        ("quiet", False, FLAG, "print warnings and errors only")]}
DEFAULTS = {name.replace("-", "_"): value for name, value, *_ in itertools.chain(*OPTIONS.values()) if value is not None}
RECIPES: dict[str, dict[str, Any]] = {                                  # what a data set's own defaults change
    "audioset": {"epochs": 60},                                         # about the updates of UCF51's recipe (ours)
    "vggsound": {"epochs": 10},                                         # likewise
    "activitynet": {"batch_size": 64, "csc_offset": 0.2},               # authors
    "demo": {"epochs": 15, "teacher_epochs": 14, "batch_size": 8, "lr": 1e-3, "width": 8, "frames": 4, "size": 32,
             "crop_area": 0.7, "spec_augment": False, "csc_offset": 0.3}}
MODES = ("eval", "predict", "explain", "benchmark")                     # in place of training
RUN_OPTIONS = {"out", "cache", "resume", "workers", "device", "quiet", "compare", "method", "seeds", "seed", "epochs",
               "max_skipped", "compile", "tensorboard",
               *(name for name, *_ in OPTIONS["instead of training"])}                   # may differ on --resume

def build_parser() -> argparse.ArgumentParser:
    """The command line. Options not given are absent: the checkpoint's or the data set's recipe fills them in."""
    def refuse(message: str) -> NoReturn:                               # one line instead of argparse's usage and error
        raise InputError(f"{message}; see python xmkd.py --help")
    parser = argparse.ArgumentParser(
        prog="xmkd.py", argument_default=argparse.SUPPRESS,
        description="Robust cross-modal knowledge distillation (arXiv 2304.07775): a noise-filtered teacher of one "
        "modality trains a student of the other.",
        epilog="Exit codes: 0 done, 2 bad input, 130 interrupted, 143 terminated.")
    parser.error = refuse  # type: ignore[method-assign]
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, default, kind, text in options:
            key = name.replace("-", "_")
            others = [f"{recipe[key]} for {layout}" for layout, recipe in RECIPES.items() if key in recipe]
            more = kind if isinstance(kind, dict) else {"type": kind} if callable(kind) else {"choices": kind}
            shown = f" (default: {', '.join([str(default), *others])})" if default is not None else ""
            group.add_argument(f"--{name}", help=text + shown, **more)
    parser.add_argument("--version", action="version", version=__version__)
    return parser

READERS: dict[str, Callable[..., tuple[list[Clip], list[str]]]] = {
    "audioset": read_audioset, "ucf101": read_ucf101, "activitynet": read_annotations, "annotation": read_annotations,
    "vggsound": read_vggsound, "folder": read_folder}

def find_layout(root: str) -> str:
    """"demo" or a key of READERS. Raises InputError naming the layouts looked for."""
    if root == "demo":
        return "demo"
    if not os.path.isdir(root):
        raise InputError(f"--data {root} is not a folder; give one, or 'demo'")
    inside, files = {name.lower() for name in os.listdir(root)}, {*map(os.path.basename, walk_files(root, ".csv"))}
    annotation = annotation_file(root)                                  # the authors' UCF51 list has no segments
    segments = annotation and '"segment"' in Path(annotation).read_text(encoding="utf-8", errors="replace")
    signs = [("ucf101", "ucftraintestlist" in inside), ("audioset", "class_labels_indices.csv" in files),
             ("activitynet", segments), ("annotation", annotation), ("vggsound", "vggsound.csv" in files),
             ("folder", "val" in inside), ("vggsound", {"train.csv", "test.csv"} <= files), ("folder", "train" in inside)]
    if found := next((layout for layout, sign in signs if sign), None):
        return found
    raise InputError(f"--data {root} has no known layout; looked for AudioSet (class_labels_indices.csv, *_segments.csv)"
                     ", UCF-101 (UCF-101/, ucfTrainTestlist/), ActivityNet (activity_net*.json), the authors' release "
                     "(annotation.json), VGGSound (vggsound.csv), a folder of folders (train/<label>/*, val/<label>/*)")

def list_clips(layout: str, settings: dict[str, Any], skipped: list[tuple[str, str]],
               console: Console) -> tuple[list[Clip], list[str], dict[str, list[str]]]:
    """Indexes a data set and prints what was found -> usable clips, class names, streams needed by split."""
    root, task, folder = settings["data"], settings["task"], settings.get("teacher_features")
    if layout == "audioset" and task != "audio_tagging":
        raise InputError(f"--task {task} needs one label a clip, AudioSet's have several; use --task audio_tagging")
    if layout == "demo":
        clips, classes = demo_clips(task == "audio_tagging", *((64, 1) if settings["benchmark"] else ()))
    else:
        choice = {"audioset": {"split": settings["split"]}, "ucf101": {"fold": settings["fold"]}}.get(layout, {})
        clips, classes = READERS[layout](root, **choice, skipped=skipped)
    listed = len(clips) + sum(reason.startswith("missing") for _, reason in skipped)
    parts = ("eval",) if "eval" in settings and task != "video_retrieval" else ("train", "eval")
    clips = [clip for clip in clips if clip.split in parts]
    # Training clips need both streams whatever the method, so that all methods see the same; UCF51 has both everywhere
    both, alone = ["audio", "video"], [STUDENT_KIND[task]]
    no_teacher = "eval" in settings or settings.get("compare", settings.get("method")) == "student"
    single = no_teacher and not any(clip.audio and clip.video for clip in clips if clip.split == "train")
    needs = {"train": alone if folder or single else both, "eval": alone}
    if layout == "ucf101" and not folder and "eval" not in settings:
        needs["eval"] = both
    lacking = {clip: "missing: no file with the other stream" for clip in clips
               if not all(getattr(clip, kind) for kind in needs[clip.split])}
    features = find_features(folder, clips) if folder else {}
    if folder:
        lacking |= {clip: f"missing: no <clip id>.npy under {folder}" for clip in clips
                    if clip.split == "train" and clip.id not in features}
    skipped += [(clip.id if folder else clip.audio or clip.id, reason) for clip, reason in lacking.items()]
    clips = [clip for clip in clips if clip not in lacking]
    counts = {part: sum(clip.split == part for clip in clips) for part in parts}
    console.say(f"data    {root} ({layout}): {len(classes)} classes, {listed:,} clips listed; with all their files: "
                + ", ".join(f"{count:,} for {part}" for part, count in counts.items())
                + (f"; {len(features):,} teacher embeddings in {folder}" if folder else ""))
    if empty := [part for part in parts if not counts[part]]:
        why = next((f"; {clip.id}: {reason}" for clip, reason in lacking.items() if clip.split == empty[0]), "")
        raise InputError(f"the {empty[0]} split of {root} is empty: no listed clip of it has its files{why}")
    return clips, classes, needs

def open_store(layout: str, settings: dict[str, Any], cache: Path | None, clips: list[Clip]) -> ClipStore:
    """The clips' streams as the settings ask for them."""
    side = round(settings["size"] * 128 / 112)                          # 112 is cropped from a shorter side of 128
    planes = cache is not None and not settings["raw_cache"]
    load: Any = partial(load_streams, fps=settings["fps"], size=side, planes=planes)
    depends: dict[str, Any] = {"audio": [], "video": [settings["fps"], side]}
    if layout == "demo":
        dials = {name: settings[name] for name in ("seed", "noise", "mismatch", "fps")}
        dials |= {"student": STUDENT_KIND[settings["task"]], "side": side}
        load, depends = partial(demo_streams, **dials), {"audio": dials, "video": dials}
    return ClipStore(cache, clips, load, depends, settings["raw_cache"])

def open_data(layout: str, settings: dict[str, Any], cache: Path, out: Path, console: Console) -> Data:
    """Indexes a data set, decodes it, writes skipped.csv; fits settings["seconds"] to the clips. Raises InputError."""
    skipped: list[tuple[str, str]] = []
    gc.disable()                                                        # millions of clips are searched for no cycle,
    try:
        clips, classes, needs = list_clips(layout, settings, skipped, console)
    finally:
        gc.enable()
    gc.freeze()                                                         # and not copied into the loader's processes
    store = open_store(layout, settings, None if settings["no_cache"] else cache, clips)
    jobs: list[tuple[int, Sequence[str]]] = [(i, needs[clip.split]) for i, clip in enumerate(clips)]
    decode = partial(store.decode, workers=settings["workers"], progress=console.progress("decoding"))
    if store.folder:
        some = decode(jobs[::max(1, len(jobs) // 8)])
        cache.mkdir(parents=True, exist_ok=True)
        size, free = len(jobs) * sum(n for _, _, n, _ in some) / len(some), shutil.disk_usage(cache).free
        console.say(f"cache   {cache}: about {size / 1e9:.2g} GB when all is decoded; {free / 1e9:.3g} GB are free there")
    done = decode(jobs)
    bad = {i: reason for i, *_, reason in done if reason}
    for i, reason in bad.items():
        path = next((path for path in (clips[i].video, clips[i].audio) if path and reason.startswith(f"{path}: ")), None)
        skipped.append((path or clips[i].audio or clips[i].id, reason.removeprefix(f"{path}: ")))
    out.mkdir(exist_ok=True)
    report = out / "skipped.csv" if RANK == 0 else Path(os.devnull)
    with report.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([("path", "reason"), *skipped])
    train, evaluation = ([i for i in range(len(clips)) if clips[i].split == part and i not in bad]
                         for part in ("train", "eval"))
    console.say(f"        {len(train):,} training and {len(evaluation):,} evaluation clips; {len(bad):,} cannot be "
                f"decoded; {len(skipped):,} left out in all, see {out / 'skipped.csv'}")
    if len(bad) > settings["max_skipped"] * len(clips):
        raise InputError(f"{len(bad)} of {len(clips)} clips are unreadable, more than the share --max-skipped "
                         f"{settings['max_skipped']:g}; the first: {next(iter(bad.values()))}")
    least = 2 * WORLD * (2 if settings["mixup"] else 1) if any(clip.split == "train" for clip in clips) else 0
    if not evaluation or len(train) < least:
        raise InputError(f"{len(train)} training and {len(evaluation)} evaluation clips can be read; needs {least} and 1")
    data = Data(store, classes, settings["task"] == "audio_tagging", train, evaluation)
    for part, name, but in (train, "training", ""), (evaluation, "evaluation", "; the metrics are means over the others"):
        lost = sorted({*range(len(classes))}.difference(*(clips[i].labels for i in part)))
        if part and lost and (part is train or data.tags):
            console.warn(f"{len(lost)} of {len(classes)} classes have no {name} clip, such as {classes[lost[0]]!r}{but}")
    if "eval" not in settings and not settings["benchmark"]:
        sounds = [n for i, lengths, *_ in done for kind, n in zip(needs[clips[i].split], lengths) if kind == "audio"]
        settings["seconds"] = min(settings["seconds"], max(0.4, max(sounds, default=math.inf) / 32000))
    return data

def print_table(rows: dict[str, list[dict[str, float]]], console: Console) -> None:
    """A line a method: the mean of each metric and, over several seeds, its standard deviation."""
    names = list(dict.fromkeys(name for runs in rows.values() for name in runs[-1]))
    console.say("\n" + " " * 10 + "".join(f"{name:>16}" for name in names))
    for method, runs in rows.items():
        cells = []
        for values in ([run[name] for run in runs if name in run] for name in names):
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        console.say(f"{method:10}" + "".join(f"{cell:>16}" for cell in cells))

def check_modes(given: dict[str, Any], saved: dict[str, Any]) -> None:
    """InputError if options contradict each other, need others, or the checkpoint cannot do what is asked."""
    for first, other in [("method", "compare"), ("teacher", "teacher_features"), ("benchmark", "compare"),
                         ("eval", "teacher"), ("predict", "teacher"), *itertools.combinations(MODES, 2),
                         *itertools.product(MODES[:3], ("compare", "method", "resume"))]:
        if given.get(first) and given.get(other):
            raise InputError(f"--{first} and --{other} exclude each other; give one".replace("_", "-"))
    for one, others in {"checkpoint": ("predict", "explain"), "predict": ("checkpoint",), "explain": ("checkpoint",),
                        "gallery": ("predict",), "json": ("predict",), "topk": ("predict",)}.items():
        if given.get(one) and not given.keys() & {*others}:
            raise InputError(f"--{one} needs --{' or --'.join(others)}")
    if "explain" in given and not (saved["filter"] and saved["method"] in ("mnf", "xmkd")):
        raise InputError(f"{given['checkpoint']} is of {saved['method']}, without a filter; give one of xmkd or mnf")

def settle(given: dict[str, Any], saved: dict[str, Any]) -> tuple[str, list[str], dict[str, Any]]:
    """Checks the options given, fills in the others -> (layout or, to predict, "files"; methods; settings)."""
    check_modes(given, saved)
    inherited = {name: value for name, value in saved.get("settings", {}).items()
                 if name not in (RUN_OPTIONS - {"seed", "max_skipped"}) | {"amp"}}
    if saved:                                                           # a recognition student serves retrieval too
        tasks = [task for task, kind in STUDENT_KIND.items() if kind == saved["network"]["kind"]]
        inherited["task"] = given.get("task", saved["task"] if saved["task"] in tasks else tasks[0])
        if inherited["task"] not in tasks:
            path = given.get("eval", given.get("checkpoint"))
            raise InputError(f"{path} is a checkpoint of --task {tasks[0]}, not of {given['task']}; leave --task out")
        if "predict" in given or ("eval" in given and inherited["task"] != "video_retrieval"):
            inherited.pop("teacher_features", None)                     # which these do not need
    layout = "files" if "predict" in given else find_layout(given.get("data", inherited.get("data", "demo")))
    settings = {**DEFAULTS, **RECIPES.get(layout, {}), **inherited, **given}
    if saved:
        settings["width"] = saved["network"]["width"]
    if layout in ("annotation", "activitynet") and not saved and "teacher" not in given:
        root = settings["data"]                                         # the authors' release brings features
        if str(annotation_file(root)).endswith("annotation.json") and any(walk_files(root, ".npy")):
            settings.setdefault("teacher_features", root)
    if not os.path.isdir(settings.get("teacher_features", ".")):
        raise InputError(f"--teacher-features {settings['teacher_features']} is not a folder; give one of .npy files")
    if settings["device"] == "auto":
        settings["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if settings["device"].startswith("cuda") and WORLD > 1:             # each process has its own
        settings["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        if (device := torch.zeros(1, device=settings["device"]).device).type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {settings['device']} cannot be used: {str(error).splitlines()[0]}") from error
    if settings["amp"] == "auto":
        half = settings["device"].startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        settings["amp"] = "bf16" if half else "none"
    if settings["amp"] == "bf16" and settings["device"].startswith("cpu"):  # seen with (3, 1, 1) over 2 frames
        raise InputError("--amp bf16 needs a GPU: on a CPU torch's gradients of 3-D convolutions are wrong; leave it out")
    settings.setdefault("class_balanced", layout == "audioset" and settings["split"] != "balanced")
    if settings["mixup"] and settings["task"] != "audio_tagging":
        raise InputError(f"--mixup mixes tags, and --task {settings['task']} has one label a clip; leave it out")
    if WORLD > 1 and (alone := next((mode for mode in MODES[1:] if settings.get(mode)), None)):
        raise InputError(f"--{alone} is for one process; start it without torchrun")
    if settings["batch_size"] % WORLD and not saved:
        raise InputError(f"--batch-size {settings['batch_size']} is not a multiple of the {WORLD} processes; make it one")
    if settings["benchmark"] and layout == "demo":
        settings["fps"] = settings["frames"]                            # a second of demo then fills a view
    chosen, every = given.get("method", "student,xmkd" if layout == "demo" else "xmkd"), ",".join(METHODS)
    methods = [method.strip() for method in given.get("compare", chosen).replace("paper", every).split(",")]
    if unknown := [method for method in methods if method not in METHODS or methods.count(method) > 1]:
        raise InputError(f"--compare {given['compare']}: {unknown[0]!r} is no method or there twice; choose from {every}")
    if given.get("teacher", "auto") not in ("auto", "scratch"):
        load_checkpoint(settings["teacher"])                            # refused now rather than after decoding
    return layout, methods, settings

def evaluate(job: Job, saved: dict[str, Any], out: Path) -> None:
    """What --eval does: results.json and a table."""
    (settings, data, _, console), begun = job, time.time()
    metrics = final_metrics(job, restore(job, "eval", saved))
    save(out / "results.json", {
        "task": settings["task"], "data": settings["data"], "method": saved["method"], "seed": saved["seed"],
        "metrics": metrics, "teacher": None, "checkpoint": settings["eval"], "warnings": console.warnings,
        "clips": {"eval": len(data.eval)}, "seconds": round(time.time() - begun, 1)})
    print_table({saved["method"]: [metrics]}, console)

def compare(job: Job, methods: list[str], cache: Path, out: Path) -> None:
    """Trains and evaluates a student by each method and seed, all with the same teacher; the table."""
    (settings, data, _, console), begun = job, time.time()
    single = len(methods) == settings["seeds"] == 1
    if settings["resume"] and not single and (out / "last.pt").exists():
        raise InputError(f"--resume: {out} holds a single run, of one method and seed; resume that or change --out")
    shown = [name for name in settings if name == "epochs" or name not in RUN_OPTIONS | {"task", "data"}]
    console.say("recipe  " + ", ".join(f"{name} {settings[name]}" for name in shown))
    teacher, info = embed_clips(job, cache) if methods != ["student"] else (None, {"kind": "none"})
    rows: dict[str, list[Any]] = {"teacher": [info["metrics"]]} if info.get("metrics") else {}
    for seed in range(settings["seed"], settings["seed"] + settings["seeds"]):
        for method in methods:
            folder = out if single else out / f"{method}-s{seed}"
            results = {**train_student(job, method, seed, teacher, folder), "teacher": info, "warnings": console.warnings}
            save(folder / "results.json", results)
            rows.setdefault(method, []).append(results["metrics"])
    if not single:
        mean = {name: statistics.mean(run[name] for run in rows[methods[-1]]) for name in results["metrics"]}
        save(out / "results.json", {**results, "seed": settings["seed"], "seeds": settings["seeds"], "metrics": mean,
                                    "table": rows, "seconds": round(time.time() - begun, 1)})
    print_table(rows, console)
    console.say(f"\n{len(data.eval):,} evaluation clips. A student's epoch is the one that did best on them, as the "
                "authors report it: a little\nflattering, alike for all; the last epoch's figures are in results.json. "
                f"All of it is in {out}")

def benchmark(job: Job, method: str) -> None:
    """Prints how fast this machine loads and trains at the run's sizes; teacher embeddings are made up."""
    settings, data, spec, console = job._replace(settings={**job.settings, "mixup": False})
    device, cuda, seed = settings["device"], settings["device"].startswith("cuda"), settings["seed"]
    prepare = Prepare(spec.size, settings["spec_augment"]).to(device)
    teacher = torch.rand(len(data.store.clips), 8 * settings["width"])
    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
    loader = data.loader(data.train * 100, spec, "train", settings, seed, teacher)
    batches, loaded = itertools.chain.from_iterable(itertools.repeat(loader)), 0
    views, boxes, _, labels, embedding = (x.to(device) if isinstance(x, Tensor) else x for x in next(batches))
    begun = clock()
    while clock() - begun < 5:
        loaded += len(next(batches)[0])
    supply = loaded / (clock() - begun)
    def step(trained: nn.Module, helper: nn.Module | None, optimizer: torch.optim.Optimizer) -> None:
        train_step(trained, helper, optimizer, prepare(views, boxes), embedding, labels, settings["csc_offset"])
    with FlopCounterMode(display=False) as counter:                     # it cannot look into compiled code
        step(*set_up(job._replace(settings={**settings, "compile": False}), method, seed, teacher)[1:])
    _, trained, helper, optimizer = set_up(job, method, seed, teacher)
    rows, marks, timed, begun = list[np.ndarray](), list[float](), nn.Sequential(trained), math.inf
    timed.register_forward_pre_hook(lambda *_: marks.append(clock()))
    timed.register_forward_hook(lambda *_: marks.append(clock()))
    optimizer.register_step_pre_hook(lambda *_: marks.append(clock()))
    while len(rows) < 6 or clock() - begun < 5:                         # the first three compile and choose kernels
        if len(rows) == 3:
            begun = clock()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        marks[:] = [clock()]
        step(timed, helper, optimizer)
        rows.append(np.diff([*marks, clock()]) * 1e3)
    prepared, forward, backward, update = times = np.median(rows[3:], axis=0)
    memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate, flops = len(labels) / times.sum() * 1e3, counter.get_total_flops() / times.sum() * 1e3
    name, clips = ("AudioSet's balanced list", 22160) if spec.kind == "audio" else ("UCF51", 4892)
    console.say(f"loader  {supply:,.0f} clips/s by {settings['workers']} workers\n"
                f"step    {times.sum():,.1f} ms for {len(labels)} clips, {rate:,.1f} clips/s: views {prepared:.1f}, "
                f"forward {forward:.1f}, losses and backward {backward:.1f}, optimizer {update:.1f}\n"
                f"        {flops / 1e12:.3g} TFLOP/s in convolutions and products, peak memory {memory / 2**30:.2f} GiB\n"
                f"epoch   {clips / min(rate, supply) / 60:,.1f} min for {name} ({clips:,} clips)\n"
                f"on      {torch.cuda.get_device_name() if cuda else f'{torch.get_num_threads()} CPU threads'}, torch "
                f"{torch.__version__}, amp {settings['amp']}, method {method}")

def run(given: dict[str, Any]) -> None:
    """What `main` does with the options given on the command line."""
    checkpoint = given.get("eval", given.get("checkpoint"))
    saved = load_checkpoint(checkpoint) if checkpoint else {}
    layout, methods, settings = settle(given, saved)
    if "predict" in settings:
        predict_files(settings, saved)
        return
    mode = next((mode for mode in MODES if settings.get(mode)), "train")
    trained = methods[0] if len(methods) == 1 else "compare"
    label = {"train": trained, "eval": f"eval-{saved.get('method')}"}.get(mode, mode)
    source = "demo" if layout == "demo" else Path(settings["data"]).resolve().name
    default = f"runs/{settings['task']}-{source}-{label}-s{saved.get('seed', settings['seed'])}"
    out = Path(settings.get("out", Path(checkpoint).parent if checkpoint and mode == "explain" else default))
    near = [folder / "cache" for folder in Path(checkpoint).absolute().parents[:2]] if checkpoint else []
    near.append(Path(saved.get("settings", {}).get("cache", out / "cache")))
    cache = Path(settings.get("cache", next((folder for folder in near if folder.exists()), out / "cache")))
    with locked(out):
        if WORLD > 1:
            backend = "cpu:gloo,cuda:nccl" if settings["device"].startswith("cuda") else "gloo"
            dist.init_process_group(backend, timeout=timedelta(days=1))   # one process may decode much longer than others
        torch.backends.cudnn.benchmark = not settings["deterministic"]   # tries which kernel is fastest
        torch.use_deterministic_algorithms(settings["deterministic"])
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")       # which that asks for
        console = Console(settings["quiet"])
        report = out / "explain" if mode == "explain" else out
        data = open_data(layout, settings, cache, report, console)      # before the next line: it fits `seconds`
        job = Job(settings, data, view_spec(settings), console)
        if mode == "benchmark":
            benchmark(job, methods[-1])
        elif mode == "eval":
            evaluate(job, saved, out)
        elif mode == "explain":
            explain(job, saved, cache, out)
        else:
            compare(job, methods, cache, out)

def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    def tell(text: str) -> None:
        print(text if WORLD == 1 else f"[{RANK}] {text}", file=sys.stderr)
    try:
        run(vars(build_parser().parse_args(argv)))
    except BrokenPipeError:                                             # whoever reads has had enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (InputError, OSError) as error:
        tell(f"error: {str(error).strip().splitlines()[-1]}")           # a worker's error carries its traceback
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        tell("error: out of memory; lower --batch-size, --frames, --size, --seconds or --width")
        return 2
    except KeyboardInterrupt as stop:
        tell("\ninterrupted; training goes on from its last epoch with the same command and --resume")
        return stop.args[0] if stop.args else 130
    if dist.is_initialized():                                           # not after an error: it would wait for the others
        dist.destroy_process_group()
    return 0

def terminate(*_: Any) -> NoReturn:
    """SIGTERM, which job schedulers send, ends a run like Ctrl-C but with exit code 143."""
    raise KeyboardInterrupt(143)


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")                    # None if closed
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]     # file names may hold any bytes
    if RANK == 0:                                                       # the others just end
        signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
