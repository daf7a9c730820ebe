# SPDX-License-Identifier: MIT
"""Robust Cross-Modal Knowledge Distillation for Unconstrained Videos, in one file.

Paper: Xia, Li, Deng, Xiong, Dou, Hu, 2023, https://arxiv.org/abs/2304.07775

    python xmkd.py                                            # built-in demo, 5 to 7 minutes
    python xmkd.py --task audio_tagging --data ./audioset     # the real thing
    torchrun --nproc_per_node 8 xmkd.py --task action_recognition --data ./ucf101

A frozen teacher of one modality (say sound) trains a student of the other (say video). Sound may
be noisy, and clips differ in how well sound and picture agree. So the Modality Noise Filter (MNF)
cleans the teacher, and Contrastive Semantic Calibration (CSC) contrasts pairs of clips by their
labels, the less sharply the more they agree.

One training step, numbered as in `train_step`; t is the teacher's embedding of a clip, y its label:
    1. student   map S, embedding p, logits = student(view)
    2. filter    gate g = sigmoid(W2 relu(BN(W1 [t ; mean S]))),  purified teacher t^ = g * t,
                 evidence s^ = relu(BN(W3 attention(query t^, keys and values S))),  y^ = W4 s^
    3. trust     similarity_ij = cos(p_i, t^_j), treated as a constant
    4. L_filter  = CE(y^, y) + 0.001 sparsity(W2) + triplet(p, t, t^)   trains the filter only
    5. L_student = CE(logits, y) + CSC(p, s^, max(similarity, 0) + offset)   trains both (kept)
    6. Adam      the student at rate `lr`, the filter at 0.2 * `lr`

Sections: 1 Method, 2 Compared methods, 3 Networks, 4 Media, 5 Data sets, 6 Demo, 7 Cache and views,
          8 Metrics, 9 Checkpoints, 10 Training, 11 Teacher, 12 Prediction, 13 Arguments and main.
To add:   a loss, see Distiller.methods in 2; a data set, see READERS in 5; nothing else changes.
Origin:   (authors) is from their released code or settings, (kept) an oddity of it, (ours) our own.
Letters:  B clips in a batch, K positions of a map, D features, C classes, T frames, N clips.
"""
from __future__ import annotations

import argparse
import csv
import ctypes
import hashlib
import io
import json
import logging
import math
import os
import re
import signal
import statistics
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate
from torchvision.models.video import R2Plus1D_18_Weights, r2plus1d_18
from torchvision.transforms import v2

class InputError(ValueError):
    """Reports bad input that the user can fix: one line with the cause and the remedy."""

# -------------------- 1. Method: noise filter, losses and the training step --------------------
class Features(NamedTuple):
    """Holds what a student returns."""
    map: Tensor         # (B, K, D) S; positions in the order t, h, w (video) or t, mel (audio)
    pooled: Tensor      # (B, D) embedding p, non-negative; another D if AudioNet has a `dim`
    logits: Tensor      # (B, C)

def cosine_matrix(a: Tensor, b: Tensor) -> Tensor:
    """Returns the cosine of all pairs of rows: (N, D) and (M, D) -> (N, M). Not for autocast."""
    # In half precision, clips that differ would get the same similarity.
    a = a.to(torch.promote_types(a.dtype, torch.float32))
    b = b.to(torch.promote_types(b.dtype, torch.float32))
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T

def label_overlap(labels: Tensor) -> Tensor:
    """Returns how much the labels of every two clips overlap: (B, B), values in 0..1, diagonal 1.

    For class indices (B,) it is 1 if they are equal, else 0, as in the authors' code. For multi-hot
    tags (B, C), 0 or 1, it is the Jaccard index of the two sets (ours).
    """
    if labels.numel() == len(labels):                       # (B,) or (B, 1)
        return (labels.reshape(-1, 1) == labels.reshape(-1)).float()
    tags = labels.to(torch.promote_types(labels.dtype, torch.float32))
    shared = tags @ tags.T                                  # (B, B) number of common tags
    count = tags.sum(1)
    union = count[:, None] + count - shared
    return torch.where(union > 0, shared / union.clamp_min(1), 1.0)

def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the clips' mean cross-entropy in nats: logits (B, C), labels (B,) or tags (B, C).

    The losses of a clip's tags are summed (ours); their mean would be too small beside CSC.
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    tags = labels.to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, tags, reduction="sum") / len(logits)

def csc_loss(student: Tensor, evidence: Tensor, similarity: Tensor, labels: Tensor,
             offset: float = 0.07) -> Tensor:
    """Contrasts student and evidence with one temperature per pair (authors' loss/csc_loss.py).

    student     (B, D)  embedding p of the student, any scale but 0; not inside torch.autocast
    evidence    (B, D)  evidence s^ that the purified teacher found in the student's map, likewise
    similarity  (B, B)  cosine_matrix(student, purified teacher).detach(); zeros for one temperature
    labels      (B,) class indices or (B, C) multi-hot tags, see `label_overlap`
    offset      temperature = max(similarity, 0) + offset, so pairs that agree are softened (kept)
    Returns the batch mean in nats: log(B) at chance, where embeddings and similarities are alike.
    Raises ValueError if shapes differ, `similarity` has a gradient or `offset` is not positive.
    """
    if similarity.requires_grad:
        raise ValueError("similarity carries a gradient but sets a temperature; pass it detached")
    size = len(labels)
    if student.shape != evidence.shape or len(student) != size or similarity.shape != (size, size):
        raise ValueError(f"student is {tuple(student.shape)}, evidence {tuple(evidence.shape)} for "
                         f"{size} labels; similarity {tuple(similarity.shape)} must be (B, B)")
    if not offset > 0:
        raise ValueError(f"offset is {offset}, but must be above 0; the authors use 0.07 or 0.2")
    temperature = similarity.clamp_min(0) + offset          # the clamp (ours) keeps it above 0
    probability = (cosine_matrix(student, evidence) / temperature).softmax(1)
    nll = -torch.log(probability + 1e-10)                   # (B, B); a pair costs 23 nats at most
    overlap = label_overlap(labels).to(nll.dtype)
    return ((nll * overlap).sum(1) / overlap.sum(1)).mean()

def sparsity_loss(weight: Tensor) -> Tensor:
    """Returns the mean L1 norm of the rows of a weight matrix (authors' `norm_loss`)."""
    return weight.abs().sum(1).mean()

def triplet_loss(student: Tensor, teacher: Tensor, purified: Tensor, margin: float = 0.2) -> Tensor:
    """Returns the mean of relu(cos(student, teacher) - cos(student, purified) + margin); (B, D)."""
    raw = F.cosine_similarity(student, teacher)
    clean = F.cosine_similarity(student, purified)
    return F.relu(raw - clean + margin).mean()

class Filtered(NamedTuple):
    """Holds what the noise filter returns."""
    teacher: Tensor     # (B, D) purified teacher t^
    evidence: Tensor    # (B, D) student's evidence s^, non-negative
    logits: Tensor      # (B, C) classes seen in the evidence
    gate: Tensor        # (B, D) how much of each teacher feature passes, 0..1
    attention: Tensor   # (B, K) where the purified teacher looks; rows sum to 1
    raw: Tensor         # (B, D) t behind the adapter; detached: to the triplet a constant

class ModalityNoiseFilter(nn.Module):
    """Gates the teacher by what the student sees, then queries the student's map with it (MNF).

    forward(teacher (B, teacher_dim), student_map (B, K, D)) -> Filtered; training needs B > 1.
    If `teacher_dim` differs from `dim`, which is D, a linear adapter comes first (ours). `heads`
    must divide `dim`. Raises ValueError if a width does not fit. The losses in `train_step` train
    it. The attributes have the names of the released checkpoints, so that their weights fit.
    """
    def __init__(self, num_classes: int, dim: int = 512, heads: int = 2,
                 teacher_dim: int | None = None):
        super().__init__()
        teacher_dim = teacher_dim or dim
        if dim % heads:
            raise ValueError(f"dim is {dim}, but must be a multiple of the {heads} heads")
        self.widths = teacher_dim, dim
        self.adapter = nn.Identity() if teacher_dim == dim else nn.Linear(teacher_dim, dim)
        self.gated_feature_composer = nn.Sequential(
            nn.Linear(2 * dim, dim // 2), nn.BatchNorm1d(dim // 2), nn.ReLU(),              # W1
            nn.Linear(dim // 2, dim))                                                       # W2
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.trans_sv = nn.Sequential(nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.ReLU())  # W3
        self.sv_cls_classifier = nn.Linear(dim, num_classes)                                # W4

    def forward(self, teacher: Tensor, student_map: Tensor) -> Filtered:
        widths = *teacher.shape[1:], *student_map.shape[2:]
        if widths != self.widths:
            raise ValueError(f"teacher and student are {widths} wide; the filter is {self.widths}")
        teacher = self.adapter(teacher)                                     # (B, D)
        context = torch.cat([teacher, student_map.mean(1)], dim=1)          # (B, 2D)
        gate = self.gated_feature_composer(context).sigmoid()               # (B, D)
        purified = gate * teacher                                           # (B, D)
        found, attention = self.attn(purified[:, None], student_map, student_map)
        evidence = self.trans_sv(found[:, 0])                               # (B, D)
        logits = self.sv_cls_classifier(evidence)                           # (B, C)
        return Filtered(purified, evidence, logits, gate, attention[:, 0], teacher.detach())

def gather(part: Tensor | None) -> Tensor | None:
    """Joins the parts of a batch that torchrun's processes hold; gradients reach one's own only."""
    if part is None or not dist.is_initialized():
        return part
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    parts[dist.get_rank()] = part
    return torch.cat(parts)

def sum_gradients(student: nn.Module, noise_filter: nn.Module | None) -> None:
    """Gives every process of torchrun the gradients of the whole batch.

    Each has the student's gradient of its own clips alone, so these are summed. Each has the
    filter's of the whole batch already; their mean removes differences by rounding.
    """
    for module in student, noise_filter or nn.Identity():
        for parameter in module.parameters():
            if dist.is_initialized() and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                if module is noise_filter:
                    parameter.grad /= dist.get_world_size()

def train_step(student: nn.Module, noise_filter: nn.Module | None, optimizer: torch.optim.Optimizer,
               inputs: Tensor, teacher: Tensor | None, labels: Tensor, offset: float = 0.07,
               margin: float = 0.2, sparsity: float = 1e-3, calibrate: bool = True,
               amp: bool = False) -> dict[str, Tensor]:
    """Updates student and filter, both in `optimizer`; returns the detached loss terms by name.

    noise_filter  ModalityNoiseFilter; a Distiller, whose loss stands for 2 to 4 and CSC; or None
    inputs        (B, ...) for the student, which returns Features; float32 or float64
    teacher       (B, teacher_dim) embeddings t, not normalised, see 11; unused without filter
    labels        (B,) class indices or (B, C) multi-hot tags
    calibrate     False gives every pair the same temperature, `offset` (method mnf)
    amp           runs the student in bfloat16; its features are float32 again in all that follows
    Under torchrun, each process passes its part of the batch and gets the terms of the whole batch.
    """
    optimizer.zero_grad()
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=amp):
        features = student.train()(inputs)                                      # 1. student
    features = Features(*[gather(part.to(inputs.dtype)) for part in features])
    labels, teacher = gather(labels), gather(teacher)
    terms = {"cls": classification_loss(features.logits, labels)}
    filter_terms = {}

    if isinstance(noise_filter, ModalityNoiseFilter):
        filtered = noise_filter.train()(teacher, features.map)                  # 2. filter
        similarity = cosine_matrix(features.pooled, filtered.teacher).detach()  # 3. trust
        if not calibrate:
            similarity = torch.zeros_like(similarity)
        w2 = noise_filter.gated_feature_composer[-1].weight
        filter_terms = {                                                        # 4. L_filter
            "filter_cls": classification_loss(filtered.logits, labels),
            "sparsity": sparsity * sparsity_loss(w2),       # without W1 (kept)
            "triplet": triplet_loss(features.pooled, filtered.raw, filtered.teacher, margin)}
        only = list(noise_filter.parameters())          # the student learns nothing from this loss
        sum(filter_terms.values()).backward(inputs=only, retain_graph=True)
        terms["csc"] = csc_loss(features.pooled, filtered.evidence, similarity, labels, offset)
    elif noise_filter is not None:
        terms["distill"] = noise_filter.train()(features, teacher, labels)

    sum(terms.values()).backward()                                              # 5. L_student
    sum_gradients(student, noise_filter)
    optimizer.step()                                                            # 6. Adam
    return {name: term.detach() for name, term in (terms | filter_terms).items()}

def make_optimizer(student: nn.Module, noise_filter: nn.Module | None, lr: float = 3e-4,
                   weight_decay: float = 5e-4, filter_lr: float = 0.2) -> torch.optim.Adam:
    """Returns the authors' Adam: the student learns at `lr`, the filter at `filter_lr` * `lr`."""
    groups = [{"params": list(student.parameters()), "lr": lr}]
    if noise_filter is not None:
        groups.append({"params": list(noise_filter.parameters()), "lr": filter_lr * lr})
    return torch.optim.Adam(groups, weight_decay=weight_decay)  # normalisation layers, too (kept)

# -------------------- 2. Compared methods, each loss with weight 1 (ours) --------------------
def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns log-probabilities: (B, C) of classes or (B, 2C) of tags, present and absent."""
    if labels.ndim == 1:
        return logits.log_softmax(1)
    return torch.cat([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=1)

def kd_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0) -> Tensor:
    """Compares softened predictions, both (B, C) logits (Hinton et al. 2015, arXiv 1503.02531)."""
    ours = log_probabilities(student / temperature, labels)
    theirs = log_probabilities(teacher / temperature, labels)
    divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return divergence * temperature ** 2

def fitnet_loss(guided: Tensor, teacher: Tensor) -> Tensor:
    """Compares the mapped student with its hint, the teacher, both (B, teacher_dim) (1412.6550)."""
    variance = teacher.var().clamp_min(1e-12)               # ours: removes the teacher's scale
    return F.mse_loss(guided, teacher) / variance

def crd_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """Contrasts projections (B, 128) of student and teacher (Tian et al. 2020, arXiv 1910.10699).

    Each student must find its own clip's teacher in the batch, and each teacher its student; clips
    with a common label are not negatives. A softmax replaces the paper's critic and memory bank.
    """
    related = (label_overlap(labels) > 0).fill_diagonal_(False)     # its own pair is the positive
    logits = (cosine_matrix(student, teacher) / temperature).masked_fill(related, -math.inf)
    own = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)

def ccl_loss(features: Features, teacher: Tensor, labels: Tensor, compose: nn.Module,
             classify: nn.Module, temperature: float = 0.5) -> Tensor:
    """Returns the loss of compositional contrastive learning (Chen et al. 2021, arXiv 2104.10955).

    The composition (B, D), teacher + compose([teacher ; student]), is classified by `classify`. Its
    predictions and the student's are pulled together, and all three embeddings are contrasted.
    """
    student = features.pooled
    compositions = []
    for part in student, student.detach():
        pair = torch.cat([F.normalize(teacher, dim=1), F.normalize(part, dim=1)], dim=1)
        compositions.append(teacher + compose(pair))
    joint, own = compositions                               # `own` gives the student no gradient
    seen = log_probabilities(features.logits, labels)
    composed = log_probabilities(classify(joint), labels)
    loss = classification_loss(classify(own), labels)
    for a, b in (seen, composed), (composed, seen):
        loss = loss + 0.5 * F.kl_div(a, b, reduction="batchmean", log_target=True)
    constant = student.new_zeros(len(student), len(student))
    for a, b in (own, teacher), (student, teacher), (student, joint):
        loss = loss + csc_loss(a, b, constant, labels, temperature)
        loss = loss + csc_loss(b, a, constant, labels, temperature)
    return loss

class Distiller(nn.Module):
    """Computes the loss of a method that has no noise filter, and holds the layers it needs.

    forward(features, teacher (B, teacher_dim), labels) -> the loss to add to the student's.
    `offset` is for csc; `probe`, for kd, maps embeddings to logits (see `linear_probe`). To add a
    method, write a function like `kd` above `methods`, and there a line with its name and its
    layers, [] for none. New layers go to the end of `layers`, constants into the function.
    """
    def __init__(self, method: str, num_classes: int, dim: int, teacher_dim: int,
                 offset: float = 0.07, probe: nn.Module | None = None):
        super().__init__()
        layers = {
            "adapter": nn.Identity() if teacher_dim == dim else nn.Linear(teacher_dim, dim),
            "teacher_128": nn.Linear(teacher_dim, 128),
            "student_128": nn.Linear(dim, 128),
            "regressor": nn.Linear(dim, teacher_dim),
            "compose": nn.Linear(2 * dim, dim),
            "classify": nn.Linear(dim, num_classes),
            "probe": probe or nn.Identity()}
        self.loss = getattr(self, method)                   # the function of that name
        self.layers = nn.ModuleDict({name: layers[name] for name in self.methods[method]})
        self.offset = offset

    def forward(self, features: Features, teacher: Tensor, labels: Tensor) -> Tensor:
        return self.loss(features, teacher, labels)

    def kd(self, features: Features, teacher: Tensor, labels: Tensor) -> Tensor:
        return kd_loss(features.logits, self.layers["probe"](teacher), labels)      # probe: ours

    def fitnet(self, features: Features, teacher: Tensor, labels: Tensor) -> Tensor:
        return fitnet_loss(self.layers["regressor"](features.pooled), teacher)

    def crd(self, features: Features, teacher: Tensor, labels: Tensor) -> Tensor:
        student = self.layers["student_128"](features.pooled)
        return crd_loss(student, self.layers["teacher_128"](teacher), labels)

    def ccl(self, features: Features, teacher: Tensor, labels: Tensor) -> Tensor:
        teacher = self.layers["adapter"](teacher)
        return ccl_loss(features, teacher, labels, self.layers["compose"], self.layers["classify"])

    def csc(self, features: Features, teacher: Tensor, labels: Tensor) -> Tensor:
        teacher = self.layers["adapter"](teacher)           # nothing is filtered: s^ = t^ = t
        similarity = cosine_matrix(features.pooled, teacher).detach()
        return csc_loss(features.pooled, teacher, similarity, labels, self.offset)

    methods = {
        "kd": ["probe"],
        "fitnet": ["regressor"],
        "crd": ["teacher_128", "student_128"],
        "ccl": ["adapter", "compose", "classify"],
        "csc": ["adapter"]}

def linear_probe(embeddings: Tensor, labels: Tensor, num_classes: int,
                 decay: float = 0.1) -> nn.Linear:
    """Fits a logistic regression from embeddings (N, D) to logits (N, C) and freezes it.

    `decay` is relative to the variance of the embeddings. Weights start from zeros, without a seed.
    """
    probe = nn.Linear(embeddings.shape[1], num_classes).to(embeddings)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = decay * embeddings.var() * probe.weight.square().sum()
        loss = classification_loss(probe(embeddings), labels) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe.requires_grad_(False)

# -------------------- 3. Networks, with the names of the released checkpoints --------------------
class FactorisedConv3d(nn.Module):
    """Convolves in space, then in time, with about as many weights as one 3-d convolution."""
    def __init__(self, c_in: int, c_out: int, kernel: tuple, stride: tuple = (1, 1, 1)):
        super().__init__()
        kt, kh, kw = kernel
        st, sh, sw = stride
        middle = (kt * kh * kw * c_in * c_out) // (kh * kw * c_in + kt * c_out)
        self.spatial_conv = nn.Conv3d(c_in, middle, (1, kh, kw), (1, sh, sw),
                                      padding=(0, kh // 2, kw // 2), bias=False)
        self.bn = nn.BatchNorm3d(middle)
        self.temporal_conv = nn.Conv3d(middle, c_out, (kt, 1, 1), (st, 1, 1),
                                       padding=(kt // 2, 0, 0), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.temporal_conv(F.relu(self.bn(self.spatial_conv(x))))

class VideoBlock(nn.Module):
    """Adds two convolutions to a shortcut; `downsample` halves time, height and width."""
    def __init__(self, c_in: int, c_out: int, downsample: bool = False):
        super().__init__()
        stride = (2, 2, 2) if downsample else (1, 1, 1)
        self.downsampleconv = self.downsamplebn = nn.Identity()
        if downsample:
            self.downsampleconv = FactorisedConv3d(c_in, c_out, (1, 1, 1), stride)
            self.downsamplebn = nn.BatchNorm3d(c_out)
        self.conv1 = FactorisedConv3d(c_in, c_out, (3, 3, 3), stride)
        self.bn1 = nn.BatchNorm3d(c_out)
        self.conv2 = FactorisedConv3d(c_out, c_out, (3, 3, 3))
        self.bn2 = nn.BatchNorm3d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsamplebn(self.downsampleconv(x))
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(shortcut + self.bn2(self.conv2(x)))

def video_stage(c_in: int, c_out: int, count: int, downsample: bool) -> nn.Sequential:
    """Returns `count` blocks, the first of them from `c_in` to `c_out` channels, see VideoBlock."""
    stage = nn.Sequential()
    stage.block1 = VideoBlock(c_in, c_out, downsample)
    stage.blocks = nn.Sequential(*[VideoBlock(c_out, c_out) for _ in range(count - 1)])
    return stage

class VideoNet(nn.Module):
    """Maps frames (B, 3, T, H, W), normalised as for ImageNet, to Features: the authors' R(2+1)D.

    Of `blocks`, (1, 1, 1, 1) is the released scripts' "depth 18" and (3, 4, 6, 3) their 34. A view
    of 16 x 112 x 112 gives K = 2 * 7 * 7; D = 8 * width. It is not torchvision's R(2+1)D.
    """
    def __init__(self, num_classes: int, blocks: Sequence[int] = (1, 1, 1, 1), width: int = 64):
        super().__init__()
        self.conv1 = FactorisedConv3d(3, width, (3, 7, 7), (1, 2, 2))
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = video_stage(width, width, blocks[0], downsample=False)
        self.conv3 = video_stage(width, 2 * width, blocks[1], downsample=True)
        self.conv4 = video_stage(2 * width, 4 * width, blocks[2], downsample=True)
        self.conv5 = video_stage(4 * width, 8 * width, blocks[3], downsample=True)
        self.cls = nn.Linear(8 * width, num_classes)

    def forward(self, frames: Tensor) -> Features:
        x = F.relu(self.bn1(self.conv1(frames)))            # (B, width, T, H/2, W/2)
        x = self.conv5(self.conv4(self.conv3(self.conv2(x))))   # (B, D, T/8, H/16, W/16)
        features = x.flatten(2).transpose(1, 2)             # (B, K, D)
        pooled = features.mean(1)                           # (B, D)
        with torch.autocast(frames.device.type, enabled=False):     # in bfloat16, scores would tie
            logits = self.cls(pooled.to(self.cls.weight.dtype))
        return Features(features, pooled, logits)

class LogMel(nn.Module):
    """Turns sound (B, samples), 32 kHz, -1..1, into PANNs' decibels (B, 1 + samples // 320, 64).

    It computes in float32; do not call its `half`. Fewer than 513 samples raise RuntimeError.
    """
    def __init__(self):
        super().__init__()
        self.mel = torchaudio.transforms.MelSpectrogram(
            32000, n_fft=1024, hop_length=320, f_min=50, f_max=14000, n_mels=64,
            norm="slaney", mel_scale="slaney")
        self.decibel = torchaudio.transforms.AmplitudeToDB("power")

    def forward(self, samples: Tensor) -> Tensor:
        with torch.autocast(samples.device.type, enabled=False):    # float16 overflows (PANNs #17)
            return self.decibel(self.mel(samples.float())).mT

class AudioBlock(nn.Module):
    """Applies two 3x3 convolutions, then average pooling of time and frequency."""
    def __init__(self, c_in: int, c_out: int, pool: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.avg_pool2d(x, self.pool)

class AudioNet(nn.Module):
    """Maps decibels (B, T, 64) of `LogMel` to Features: PANNs' CNNs without dropout.

    stages=4 is Cnn10: T is at least 16, and 10 s give K = 62 * 4. stages=6 is Cnn14_emb512: T is at
    least 32, and 10 s give K = 31 * 2. The map, D = width * 2 ** (stages - 1), averaged over mel,
    becomes one vector by max + mean over time. dim=None takes this as the embedding (our students);
    else PANNs' fc1 maps it to `dim`. SpecAugment is in `Prepare`.
    """
    def __init__(self, num_classes: int, width: int = 64, stages: int = 4, dim: int | None = 512):
        super().__init__()
        self.bn0 = nn.BatchNorm1d(64)                       # over the mel bins
        c_in = 1
        for i in range(1, stages + 1):
            c_out = width * 2 ** (i - 1)
            self.add_module(f"conv_block{i}", AudioBlock(c_in, c_out, pool=2 if i < 6 else 1))
            c_in = c_out
        self.fc1 = nn.Linear(c_in, dim) if dim else nn.Identity()
        self.fc_audioset = nn.Linear(dim or c_in, num_classes)

    def forward(self, logmel: Tensor) -> Features:
        x = self.bn0(logmel.transpose(1, 2))                # (B, 64, T), as BatchNorm1d takes it
        x = x.transpose(1, 2)[:, None]                      # (B, 1, T, 64)
        for block in self.children():
            if isinstance(block, AudioBlock):
                x = block(x)                                # in the end (B, D, T/16, 4) for Cnn10
        profile = x.mean(3)                                 # (B, D, T/16)
        pooled = F.relu(self.fc1(profile.amax(2) + profile.mean(2)))        # (B, dim)
        with torch.autocast(logmel.device.type, enabled=False):     # in bfloat16, scores would tie
            logits = self.fc_audioset(pooled.to(self.fc_audioset.weight.dtype))
        return Features(x.flatten(2).transpose(1, 2), pooled, logits)

def make_network(kind: str, num_classes: int, width: int, **more) -> nn.Module:
    """Returns a "video" or "audio" network; a student's D is 8 * width. `more` is passed on."""
    if kind == "video":     # channels last: 1.25 times as fast, 0.8 for many frames on a CPU
        return VideoNet(num_classes, width=width, **more).to(memory_format=torch.channels_last_3d)
    more.setdefault("dim", None)                            # a student of sound, see AudioNet
    return AudioNet(num_classes, width, **more).to(memory_format=torch.channels_last)

class Prepare(nn.Module):
    """Turns raw views into a network's input, in float32 on the views' device.

    Frames (B, T, 3, H, W) in uint8 become (B, 3, T, H, W), normalised as for ImageNet. Sound
    (B, samples) in int16 becomes decibels (B, T, 64), with SpecAugment's stripes in train mode.
    """
    def __init__(self):
        super().__init__()
        self.logmel = LogMel()
        self.mean = nn.Buffer(torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1))
        self.std = nn.Buffer(torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1))

    def forward(self, views: Tensor) -> Tensor:
        if views.ndim == 5:
            return (views.transpose(1, 2).float() / 255 - self.mean) / self.std
        logmel = self.logmel(views.float() / 32767)
        if not self.training:
            return logmel
        mean = logmel.mean()
        logmel = logmel - mean                              # 0, the mean, fills two stripes an axis
        wide = max(2, logmel.shape[1] * 64 // 1001)         # PANNs: 64 of 1001 frames, 8 of 64 bins
        for axis, width in (1, wide), (2, 8), (1, wide), (2, 8):
            logmel = torchaudio.functional.mask_along_axis_iid(logmel, width, 0.0, axis)
        return logmel + mean

# -------------------- 4. Media: from files to tensors, by FFmpeg (PyAV) --------------------
@contextmanager
def open_stream(path: str | Path, kind: str, seek: float = 0.0) -> Iterator:
    """Yields a file's "audio" or "video" stream, from `seek` seconds on; errors name the file."""
    options = {"protocol_whitelist": ""}        # a playlist must not open other files or addresses
    try:
        with open(path, "rb") as file:
            # FFmpeg does not recognise MPEG-TS, packets of 188 bytes, of two or three pictures.
            form = "mpegts" if file.peek()[:752:188] == b"GGGG" else None
            with av.open(file, format=form, options=options, metadata_errors="replace") as media:
                stream = choose_stream(media, kind)
                if seek > 0:
                    media.seek(round(seek * av.time_base) + (media.start_time or 0))
                yield stream
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:                  # PyAV raises a dozen types, depending on the damage
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: it cannot be decoded ({reason})") from error

def choose_stream(container, kind: str):
    """Returns the stream that FFmpeg would choose; cover art is not video."""
    cover = av.stream.Disposition.attached_pic
    for stream in container.streams.best(kind), *getattr(container.streams, kind):
        if stream and stream.codec_context and not stream.disposition & cover:
            stream.thread_type = "NONE"         # decoder threads can hang in forked processes
            return stream
    raise InputError(f"it has no {kind} stream that FFmpeg can decode")

def find_seek(path: str | Path, kind: str, start: float) -> float:
    """Returns the second to seek to before decoding from `start` on; 0 is the file's beginning."""
    # In MPEG-TS, or with wrong key flags, a seek can land after `start`. So it is tried first.
    if start > 1:
        with suppress(InputError), open_stream(path, kind, start - 1) as stream:
            begin, *_ = next(decode_frames(stream, start, start), [math.inf])
            if begin <= start:
                return start - 1
    return 0.0

def decode_frames(stream, start: float, end: float) -> Iterator[tuple]:
    """Yields (begin, length, frame) in seconds up to the file's end; start..end must be intact."""
    origin = (stream.container.start_time or 0) / av.time_base
    intact, damaged, following = False, False, 0.0
    for packet in stream.container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            intact, damaged = False, True       # until a key frame: other pictures depend on it
            continue
        # An edit list may begin inside a group of pictures: the key frame before it is not shown.
        intact = intact or packet.is_discard
        for frame in frames:
            if frame.is_corrupt:
                intact, damaged = False, True
            elif stream.type == "audio" or frame.key_frame or frame.pict_type in (0, 1):
                intact = True           # some have no type (0), others I (1) without key
            if not intact:
                continue
            # Raw streams have no times: each frame begins where the one before it ends.
            begin = following if frame.time is None else frame.time - origin
            lost = min(begin, end) - max(following, start)
            if damaged and lost > 0.5:
                raise InputError(f"{lost:.1f} s of its {stream.type} are damaged")
            damaged = False
            if stream.type == "audio":
                length = frame.samples / frame.sample_rate
            else:
                length = float(frame.duration * frame.time_base or 1 / (stream.guessed_rate or 25))
            following = begin + length
            yield begin, length, frame

def check_length(stream, start: float, end: float, got: float) -> None:
    """Raises InputError unless the `got` seconds from `start` on are what the header promises."""
    if got <= 0.001:
        raise InputError(f"there is no {stream.type} from {start:g} to {end:g} s")
    container = stream.container
    origin = (container.start_time or 0) / av.time_base
    form = container.format.name.split(",")[0]
    first = stream.start_time or 0
    last = -math.inf                            # other formats guess, which promises nothing
    told = (first + (stream.duration or 0)) * stream.time_base
    # FFmpeg guesses from the size if an MP3 has no LAME header, or a large tag after the sound.
    guessed = form == "mp3" and told * stream.bit_rate < 1.05 * 8 * container.size
    if form == "matroska" and "DURATION" in stream.metadata:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        last = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    elif form == "matroska" and len(container.streams) == 1 and not stream.duration:
        last = (container.duration or 0) / av.time_base     # else a guess, or another stream's
    elif form == "avi" and stream.frames < 2 ** 30:         # 2 ** 30: unknown, as in a pipe
        last = (first + stream.frames) * stream.time_base   # `duration` is what is left
    elif form in ("mov", "flac", "aiff", "mp3") and not guessed:
        last = told
    promised = min(last - origin, end) - start
    if got < promised - max(0.3, 0.1 * promised):
        raise InputError(f"truncated: {got:.1f} of {promised:.1f} s of {stream.type} are left")

def decode_audio(path: str | Path, start: float = 0.0, end: float | None = None) -> Tensor:
    """Decodes the sound between two times: (samples,) float32, mono, 32 kHz, about -1..1.

    start, end  seconds since the file's start; `end` is the file's end by default and at most
    Mono is the mean of the channels. Gaps between timestamps and a late start become silence.
    Raises InputError if there is no sound, a sample is beyond 2 (lossy codecs pass 1), the file is
    damaged, cannot be decoded or (not told by WAV or Ogg) is truncated; ValueError for bad times.
    """
    end = math.inf if end is None else end
    if not 0 <= start < end:
        raise ValueError(f"start is {start} and end {end}; pass 0 <= start < end, in seconds")
    rate = 32000
    parts, written, heard = [], 0, False
    with open_stream(path, "audio", find_seek(path, "audio", start)) as stream:
        frames = decode_frames(stream, start, end)
        for begin, samples in join_frames(frames, end, rate):
            gap = round((begin - start) * rate) - written
            samples = np.pad(samples, (max(gap, 0), 0))
            samples = samples[max(-gap, 0):]    # drops overlaps and what lies before `start`
            parts.append(samples)
            written += len(samples)
            if begin < end:                     # else it is silence before what comes later
                heard = written > 0
        size = round(min(written, (end - start) * rate))
        check_length(stream, start, end, size / rate if heard else 0.0)
        sound = np.concatenate(parts)[:size]
        peak = np.abs(sound).max()
        if not peak <= 2:                       # also NaN
            raise InputError(f"its samples reach {peak:g}, not at most 2; scale them to -1..1")
    return torch.from_numpy(sound)

def join_frames(frames: Iterator[tuple], end: float, rate: int) -> Iterator[tuple]:
    """Yields (seconds, mono samples at `rate`) for each stretch of frames without a gap."""
    stretches, overlap = [], 0.0
    following, source = -math.inf, 0
    for begin, length, frame in frames:
        gap = abs(begin - following) > 0.01             # a smaller one is jitter or rounding
        if gap or frame.sample_rate != source:
            overlap += max(following - begin, 0.0)
            following, source, parts = begin, frame.sample_rate, []
            stretches.append((begin, source, parts))
        if overlap > max(0.5, 0.1 * begin):
            raise InputError("its timestamps overlap or restart in mid-stream; convert it")
        parts.append(to_mono(frame))
        following += length
        if begin >= end:                                # the sound goes on after the end
            break
    for begin, source, parts in stretches:
        frame = av.AudioFrame.from_ndarray(np.concatenate(parts)[None], "fltp", "mono")
        frame.sample_rate = source
        resampler = av.AudioResampler("fltp", "mono", rate)
        resampled = resampler.resample(frame) + resampler.resample(None)
        yield begin, np.concatenate([part.to_ndarray()[0] for part in resampled])

def to_mono(frame: av.AudioFrame) -> np.ndarray:
    """Returns the mean of a frame's channels, whatever its sample format: (samples,) float32."""
    channels = frame.to_ndarray()
    if not frame.format.is_planar:
        channels = channels.reshape(frame.samples, -1).T
    mono = channels.mean(0, dtype=np.float64)
    if channels.dtype == np.uint8:
        mono -= 128
    if channels.dtype.kind in "iu":
        mono /= 2 ** (8 * channels.itemsize - 1)
    return mono.astype(np.float32)

def decode_video(path: str | Path, start: float = 0.0, end: float | None = None, fps: float = 4.0,
                 side: int = 128) -> Tensor:
    """Decodes the pictures between two times at a fixed rate: (T, 3, H, W) uint8 RGB.

    start, end  seconds since the file's start; `end` is the file's end by default and at most
    fps         picture k is the one that is shown at start + k / fps, so a picture may repeat
    side        shorter side, in pixels, to which larger pictures are scaled down
    Raises InputError if no picture is shown by start + 0.5 s, over 0.5 s are damaged, it cannot be
    decoded or lacks over 10 % (and 0.3 s) of its header's length; ValueError if an argument is bad.
    """
    end = math.inf if end is None else end
    if not (0 <= start < end and 0 < fps < math.inf and side >= 1):
        raise ValueError(f"start {start}, end {end}, fps {fps}, side {side}; pass 0 <= start < end,"
                         " fps above 0 and side at least 1")
    pictures, size, stop = [], None, start
    with open_stream(path, "video", find_seek(path, "video", start)) as stream:
        frames = decode_frames(stream, start, end)
        for begin, stop, frame in show_frames(frames, stream):
            if not pictures and begin > start + 0.5:
                raise InputError(f"there is no picture between {start:g} and {begin:g} s")
            stop = min(stop, end)
            due = math.ceil((stop - 1e-3 - start) * fps)        # Matroska rounds to 1 ms
            if due > len(pictures):
                width = frame.width * (stream.sample_aspect_ratio or 1)
                size = size or scaled_size(width, frame.height, side)
                picture = to_rgb(frame, size)
                pictures += [picture] * (due - len(pictures))
            if stop == end:
                break
        check_length(stream, start, end, stop - start)
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

def show_frames(frames: Iterator[tuple], stream) -> Iterator[tuple]:
    """Yields (begin, stop, frame): when each picture of a stream is shown, in seconds."""
    # B-frames in AVI carry each other's times, so the k-th picture gets the k-th smallest.
    times, pictures = [], []
    shown, stop = -math.inf, 0.0
    for begin, length, frame in frames:
        times = sorted(times + [begin])
        pictures.append(frame)
        stop = times[-1] + length
        if len(pictures) > 8:                   # reordering spans no more
            if times[0] < shown:
                raise InputError("its timestamps restart in mid-stream; convert it")
            shown = times.pop(0)
            yield shown, times[0], pictures.pop(0)
    if stream.container.format.name == "avi" and len(stream.index_entries):
        # Each empty chunk after the pictures of an AVI shows the last one again.
        last = stream.index_entries[-1]
        tail = np.fromfile(stream.container.name, np.uint8, offset=last.pos).tobytes()
        empty = re.findall(rb"%02d[a-z]{2}\0{4}" % stream.index, tail.partition(b"idx1")[0])
        stop += len(empty) / stream.guessed_rate
    yield from zip(times, times[1:] + [stop], pictures)

def scaled_size(width: float, height: float, side: int) -> tuple[int, int]:
    """Returns (width, height) for a shorter side of `side` pixels, or unchanged if it has less."""
    scale = min(1.0, side / min(width, height))
    return round(width * scale), round(height * scale)

def to_rgb(frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """Scales a frame to (width, height) and rotates it as players do: (H, W, 3) uint8."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if frame.format.name.startswith("yuv"):     # scaling first is four times as fast
        frame = frame.reformat(*size, threads=1)
    picture = frame.reformat(*size, "rgb24", threads=1).to_ndarray()
    if matrix is not None:
        # The pixel (x, y) is shown at (a x + c y, b x + d y): phones rotate and mirror so.
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]
        if abs(b) > abs(a):
            picture = picture.swapaxes(0, 1)
            a, d = c, b
        picture = picture[::np.sign(d), ::np.sign(a)]
    return picture

def decode_hdf5(path: str | Path, side: int = 128) -> Tensor:
    """Decodes the authors' HDF5: a JPEG for each frame in `video` -> (T, 3, H, W) uint8 RGB.

    Raises InputError without h5py or if it cannot be decoded; `side` is as in `decode_video`.
    """
    pictures, size = [], None
    try:
        import h5py
        with h5py.File(path) as file:
            for jpeg in file["video"]:
                picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
                size = size or scaled_size(picture.width, picture.height, side)
                pictures.append(picture.resize(size, Image.Resampling.BILINEAR))
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    except Exception as error:                  # ImportError, and h5py and Pillow raise many types
        raise InputError(f"{path}: its JPEGs cannot be read ({error})") from error

# -------------------- 5. Data sets: each reader returns (clips, class names) --------------------
class Clip(NamedTuple):
    """One sample of a data set; `load_stream` decodes its part of the files."""
    id: str
    labels: tuple[int, ...]         # indices into the class names, at least one
    split: str                      # "train" or "eval"
    audio: str | None = None        # path of the file with the sound
    video: str | None = None        # path of the file with the pictures, often the same
    start: float = 0.0              # seconds
    end: float | None = None        # seconds; None: to the end of the file
    cut: bool | None = None         # if its files hold start to end alone; None: their lengths tell

DataSet = tuple[list[Clip], list[str]]          # clips and class names
SOUND_FILES = tuple(""".wav .flac .mp3 .m4a .ogg .oga .opus .aac .mka .weba .aif .aiff .aifc .caf
    .au .snd .wma .ac3 .eac3 .dts .mp2 .mpa .m4b .wv .ape .tta .amr .w64""".split())
FILM_FILES = tuple(""".mp4 .mkv .webm .avi .mov .m4v .mpg .mpeg .mpe .ts .3gp .3g2 .mts .m2ts .m2t
    .vob .flv .f4v .wmv .asf .ogv .ogm .divx .dv .qt .rm .rmvb .mxf .nut""".split())
FRAME_FILES = (".hdf5",)                        # a JPEG a frame, as in the authors' release
MEDIA_FILES = SOUND_FILES + FILM_FILES + FRAME_FILES
NO_MEDIA = "not used: only files with the ending of a media file are"
MISSING = {"train": "missing: no file is named after this training clip",
           "eval": "missing: no file is named after this evaluation clip"}

def find_list(root: str | Path, *patterns: str) -> Path:
    """Returns the match in `root` or one folder below. Raises InputError unless there is one."""
    for pattern in patterns:
        for place in (pattern, f"[!.]*/{pattern}"):
            found = [path for path in sorted(Path(root).glob(place)) if path.name[0] != "."]
            if len(found) > 1:
                raise InputError(f"{root}: {found[0]} and {found[1]} are both there; move one away")
            if found:
                return found[0]
    raise InputError(f"{root}: {' or '.join(patterns)} is missing; put it here or one folder below")

def read_text(path: Path) -> str:
    """Reads a list, with accents spelled in one way (NFC). Raises InputError if it is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeError as error:
        raise InputError(f"{path}: {error}; save it in UTF-8") from None
    if path.suffix == ".json":                  # may write an accent as its number, \u0301
        text = json.dumps(json.loads(text), ensure_ascii=False)
    return unicodedata.normalize("NFC", text)

def read_table(path: Path, header: str) -> list[tuple[str, dict[str, str]]]:
    """Returns (place, {column: cell}) of each row below the header; a place is "clips.csv:3"."""
    rows, reader = [], csv.DictReader(io.StringIO(read_text(path)), restval="")
    if not set(header.split(",")) <= set(reader.fieldnames or []):
        raise InputError(f"{path}: its first line must name the columns {header}, with commas")
    for row in reader:
        place = f"{path}:{reader.line_num}"
        if "".join(row.pop(None, [])).strip():
            raise InputError(f"{place}: it has more cells than the header; quote those with commas")
        rows.append((place, row))
    return rows

def are_times(start: float, end: float | None) -> bool:
    """Returns whether these can be a part of a file, in seconds; None is the file's end."""
    return 0 <= start < math.inf and (end is None or start < end < math.inf)

def make_clips(rows: Iterable[tuple], classes: list[str]) -> list[Clip]:
    """Makes clips of (place, id, [label, ...], split, start, end). Raises InputError.

    place  the file and line that the error names; start 0 and end None take the whole file
    """
    clips, index = [], {name: i for i, name in enumerate(classes)}
    for place, *row in rows:
        try:
            name, names, split, start, end = row
            labels = tuple(sorted({index[label] for label in names}))
            start, end = float(start), end and float(end)
        except (KeyError, TypeError, ValueError):
            labels = ()
        if not (labels and name and split in MISSING and are_times(start, end)):
            raise InputError(f"{place}: expected an id, known labels, split train or eval and "
                             f"0 <= start < end, got {str(row)[:200]}")
        clips.append(Clip(name, labels, split, start=start, end=end))
    return clips

def find_files(root: str | Path, embeddings: bool = False) -> list[str]:
    """Returns the sorted paths of all files below `root` but hidden ones: .npy or all others."""
    found, seen = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:                        # by a link, which may lead round in a circle
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        names = [name for name in names if name.endswith(".npy") == embeddings and name[0] != "."]
        found += [os.path.join(folder, name) for name in names]
    return sorted(filter(os.path.isfile, found))

def name_of(path: str) -> str:
    """Returns a file's name without extension and, of yt-dlp's parts, without .f137 or .temp."""
    stem = os.path.splitext(os.path.basename(path))[0]
    return re.sub(r"\.(temp|f\d{2,}(-[^.]*)?)$", "", stem) if "." in stem else stem

def streams_in(path: str, look: bool = True) -> set[str]:
    """Returns which of "audio" and "video" a file holds or, unless `look`, may hold by its name."""
    if path.lower().endswith(FRAME_FILES):
        return {"video"}
    if not look:
        return {"audio"} if path.lower().endswith(SOUND_FILES) else {"audio", "video"}
    held = set()
    for kind in ("audio", "video"):
        with suppress(InputError), open_stream(path, kind):
            held.add(kind)
    return held

def choose_files(clip: Clip, cut_of: dict[str, bool | None], skipped: list) -> Clip:
    """Returns the clip with a file for its sound and one for its pictures, out of {path: cut}."""
    if len(cut_of) == 1:                    # is not opened: with two million clips this takes hours
        path, cut = cut_of.popitem()
        return clip._replace(cut=cut, **dict.fromkeys(streams_in(path, look=False), path))
    held = {path: streams_in(path) for path in cut_of}

    def rank(path: str) -> tuple:
        # Cut files come first, yt-dlp's parts last; sound files before films, silent films last.
        # What cannot be read serves if there is nothing else, since decoding says why.
        source = not held[path], not cut_of[path], name_of(path) != Path(path).stem
        is_film = not path.lower().endswith(SOUND_FILES)
        return source, is_film, -len(held[path]), len(path), path

    files = {}
    for path in sorted(cut_of, key=rank):
        for kind in held[path] or streams_in(path, look=False):
            files.setdefault(kind, path)
    unused = [path for path in cut_of if path not in files.values()]
    skipped += [(path, "not used: other files of this clip come first") for path in unused]
    cuts = {cut_of[path] for path in files.values()}
    cut = cuts.pop() if len(cuts) == 1 else None
    return clip._replace(**files, cut=cut)

def attach_files(clips: list[Clip], root: str | Path, skipped: list | None,
                 match: Callable[[str, str], tuple[list, bool | None]]) -> list[Clip]:
    """Gives each clip its media files below `root` and returns the clips that have any.

    match    turns a path below `root` and its name without extension into (ids, cut as in Clip).
    skipped  gets (id or path, reason) of clips listed twice or without a file, and of unused files.
    Raises InputError if no clip has a file.
    """
    skipped = [] if skipped is None else skipped
    root = str(Path(root))                      # without a slash at its end
    files = {clip.id: {} for clip in clips}     # {path: cut} of each
    for path in find_files(root):
        below = unicodedata.normalize("NFC", path[len(root) + 1:])
        ids, cut = match(below, name_of(below))
        known = files.keys() & ids
        if path.lower().endswith(MEDIA_FILES):
            for name in known:
                files[name][path] = cut
        elif known:
            skipped.append((path, NO_MEDIA))
    found = []
    for clip in clips:
        candidates = files.pop(clip.id, None)
        if candidates is None:
            skipped.append((clip.id, "listed twice: the first row counts"))
        elif not candidates:
            skipped.append((clip.id, MISSING[clip.split]))
        else:
            found.append(choose_files(clip, candidates, skipped))
    if not found:
        ids = [clip.id for clip in clips[:3]]
        media = [path for path in find_files(root) if path.lower().endswith(MEDIA_FILES)]
        raise InputError(f"{root}: no file is named after any of {len(clips):,} listed clips; the "
                         f"first ids are {ids}, the first files {media[:3]}; they must match")
    return found

def coverage(clips: list[Clip], skipped: list) -> str:
    """Says how many of the listed clips of each split have a file."""
    reasons = Counter(reason for _, reason in skipped)
    parts = []
    for split, name in (("train", "training"), ("eval", "evaluation")):
        found = sum(clip.split == split for clip in clips)
        listed = found + reasons[MISSING[split]]
        share = found / max(listed, 1)
        parts.append(f"{found:,} of {listed:,} {name} clips ({share:.1%})")
    return "found " + " and ".join(parts)

def lone_labels(clips: list[Clip], classes: list[str]) -> list[str]:
    """Returns the labels that only training or only evaluation clips have, and which of the two."""
    seen = {"train": set(), "eval": set()}
    for clip in clips:
        seen[clip.split].update(clip.labels)
    lone = [f"{classes[k]} (training)" for k in seen["train"] - seen["eval"]]
    return sorted(lone + [f"{classes[k]} (evaluation)" for k in seen["eval"] - seen["train"]])

def tells_start(rest: str, start: float) -> bool:
    """Returns whether the start time follows the id in a file's name; then the file is cut."""
    # Downloaders write `_30.000_40.000`, `_30.0-40.0`, `_30`, or in milliseconds `_30000_40000`.
    found = re.match(r"[_-]*(\d+\.?\d*)([_-]+\d+\.?\d*)?(?:[_-]|$)", rest)
    if not found:
        return False
    told, margin = float(found[1]), 1 if found[2] else 0.001    # one number may be an index
    return abs(told - start) < margin or (start > 0 and abs(told / 1000 - start) < 0.01)

def read_audioset(root: str | Path, split: str = "balanced",
                  skipped: list | None = None) -> DataSet:
    """Reads AudioSet: class_labels_indices.csv, *_segments.csv and media anywhere below `root`.

    split  training list: "balanced", "unbalanced" or "all"; the evaluation list is always read.
    A file's name begins with the clip's id, or with Y, v_, id_ or v and the id. Raises InputError.
    """
    table = read_table(find_list(root, "class_labels_indices.csv"), "index,mid,display_name")
    labels = sorted([row for _, row in table if row["mid"]], key=lambda row: int(row["index"]))
    names = ["balanced_train", "unbalanced_train"] if split == "all" else [f"{split}_train"]

    def rows() -> Iterator[tuple]:
        for name in [*names, "*eval"]:
            path = find_list(root, f"{name}_segments.csv")
            part = "eval" if name == "*eval" else "train"
            for number, line in enumerate(read_text(path).splitlines(), 1):
                # Spreadsheets add quotes, spaces and empty cells, and turn an id into #NAME?.
                cells = line.replace('"', " ").replace(",", " ").split()
                if not cells or cells[0] == "#":
                    continue
                if len(cells[0]) != 11:
                    raise InputError(f"{path}:{number}: {cells[0]!r} is no id of 11 characters")
                yield f"{path}:{number}", cells[0], cells[3:], part, *cells[1:3]

    clips = make_clips(rows(), [row["mid"] for row in labels])
    start_of = {clip.id: clip.start for clip in clips}

    def match(path: str, stem: str) -> tuple[list, bool | None]:
        for prefix in ("", "Y", "v_", "id_", "v"):      # "" first: an id may begin with Y or v
            name = stem.removeprefix(prefix)
            ytid, rest = name[:11], name[11:]
            if ytid in start_of:
                return [ytid], tells_start(rest, start_of[ytid]) or None
        return [], None

    classes = [row["display_name"].strip() for row in labels]
    return attach_files(clips, root, skipped, match), classes

# The 51 classes of UCF-101 that have sound.
UCF51 = """applyeyemakeup applylipstick archery babycrawling balancebeam bandmarching
    basketballdunk blowdryhair blowingcandles bodyweightsquats bowling boxingpunchingbag
    boxingspeedbag brushingteeth cliffdiving cricketbowling cricketshot cuttinginkitchen
    fieldhockeypenalty floorgymnastics frisbeecatch frontcrawl haircut hammerthrow hammering
    handstandpushups handstandwalking headmassage icedancing knitting longjump moppingfloor
    parallelbars playingcello playingdaf playingdhol playingflute playingsitar rafting shavingbeard
    shotput skydiving soccerpenalty stillrings sumowrestling surfing tabletennisshot typing
    unevenbars wallpushups writingonboard""".split()

def read_ucf101(root: str | Path, fold: int = 1, skipped: list | None = None) -> DataSet:
    """Reads UCF-101: ucfTrainTestlist/*.txt and v_*.avi, but only the 51 classes with sound.

    fold  1, 2 or 3. Case is ignored, since UCF-101 itself varies it. Raises InputError.
    """
    names = read_text(find_list(root, "classInd.txt")).split()[1::2]    # "1 ApplyEyeMakeup" ...
    known = [name.lower() for name in names]
    classes = sorted(name for name in names if name.lower() in UCF51)
    index = {name.lower(): i for i, name in enumerate(classes)}
    clips = []
    for split, name in (("train", "trainlist"), ("eval", "testlist")):
        path = find_list(root, f"{name}0{fold}.txt")
        for number, line in enumerate(read_text(path).splitlines(), 1):
            label, _, rest = line.strip().lower().partition("/")
            if label and (label not in known or len(rest.split()) not in (1, 2)):
                raise InputError(f"{path}:{number}: expected <known class>/<file>, got {line!r}")
            if label in index:
                clips.append(Clip(name_of(line.split()[0]), (index[label],), split))
    id_of = {clip.id.lower(): clip.id for clip in clips}
    match = lambda path, name: ([id_of.get(name.lower())], None)
    return attach_files(clips, root, skipped, match), classes

def read_annotations(root: str | Path, skipped: list | None = None) -> DataSet:
    """Reads annotation.json of the authors' release, or ActivityNet's activity_net*.json.

    As in the authors' code, a clip is a segment. Its file is either cut, `v_<id>_<k>.*`, or the
    whole video, `v_<id>.*` or `<id>.*`. Segments whose times cannot be are named in `skipped`.
    The classes are in the order of `labels` or, without it, sorted. Raises InputError.
    """
    skipped = [] if skipped is None else skipped
    path = find_list(root, "*annotation.json", "activity_net*.json")
    content = json.loads(read_text(path))
    splits = {"training": "train", "validation": "eval"}
    rows, labels = [], set()
    for key, entry in content["database"].items():
        notes = {f"v_{key}_{k}": note for k, note in enumerate(entry.get("annotations", []))}
        for name, note in [(key, entry), *notes.items()]:       # notes: ActivityNet's
            if entry["subset"] not in splits or "label" not in note:
                continue
            labels.add(note["label"])
            start, end = note.get("segment", (0.0, None))
            if are_times(start, end):
                split = splits[entry["subset"]]
                rows.append((f"{path}: {name}", name, [note["label"]], split, start, end))
            else:
                skipped.append((name, f"not used: {path} has it from {start} to {end} s"))
    classes = content.get("labels") or sorted(labels)
    clips, id_of, segments = make_clips(rows, classes), {}, defaultdict(list)
    for clip in clips:
        id_of[clip.id] = clip.id
        if clip.end is None:
            id_of[clip.id.lower()] = clip.id            # UCF51's files differ in case
        else:
            segments[clip.id.rpartition("_")[0]].append(clip.id)

    def match(path: str, stem: str) -> tuple[list, bool]:
        name = id_of.get(stem) or id_of.get(stem.lower())
        if name or path.lower().endswith(FRAME_FILES):  # frames of a whole video carry no times
            return [name], True
        return segments.get(stem) or segments.get(f"v_{stem}", []), False

    return attach_files(clips, root, skipped, match), classes

def read_folder(root: str | Path, skipped: list | None = None) -> DataSet:
    """Reads train/<label>/* and val/<label>/* in `root` or one folder below: one label a clip.

    Files of one name in one folder are one clip. Raises InputError if there is no val/.
    """
    skipped = [] if skipped is None else skipped
    root = find_list(root, "train").parent
    if not (root / "val").is_dir():
        raise InputError(f"{root}: it has train/, but no val/; rename the likes of test/ to val/")
    groups = defaultdict(dict)
    for path in find_files(root / "train") + find_files(root / "val"):
        below = unicodedata.normalize("NFC", os.path.relpath(path, root))
        folder = os.path.dirname(below)
        if "/" in folder and path.lower().endswith(MEDIA_FILES):
            groups[f"{folder}/{name_of(below)}"][path] = None
        else:
            skipped.append((path, f"{NO_MEDIA}, in {folder.split('/')[0]}/<label>/"))
    classes = sorted({name.split("/")[1] for name in groups})
    clips = []
    for name, paths in groups.items():
        part, label, *_ = name.split("/")
        split = "train" if part == "train" else "eval"
        clips.append(choose_files(Clip(name, (classes.index(label),), split), paths, skipped))
    return clips, classes

def read_list(root: str | Path, skipped: list | None = None) -> DataSet:
    """Reads any other data set: clips.csv with the header `id,split,labels`, labels joined by `;`.

    The split is train or eval, and the media files are called `<id>.*`; an id may contain folders.
    With columns `start` and `end`, in seconds, a clip is that part of its file. Where several rows
    have one id, each part is a clip called `<id>@<start>-<end>`, as in a@0-2.5. Raises InputError.
    """
    rows = []
    for place, row in read_table(find_list(root, "clips.csv"), "id,split,labels"):
        labels = {name.strip() for name in row["labels"].split(";")} - {""}
        times = row.get("start") or 0, row.get("end") or None
        rows.append((place, row["id"], labels, row["split"], *times))
    classes = sorted(set().union(*[labels for _, _, labels, *_ in rows]))
    counts = Counter(name for _, name, *_ in rows)
    clips, ids_of = [], defaultdict(list)
    for clip in make_clips(rows, classes):
        name, times = clip.id, [time for time in (clip.start, clip.end) if time is not None]
        if counts[clip.id] > 1 and any(times):
            name += "@" + "-".join(f"{time:.15g}" for time in times)
        ids_of[clip.id].append(name)
        clips.append(clip._replace(id=name))

    def match(path: str, name: str) -> tuple[list, bool]:
        stem = os.path.splitext(path)[0]
        # The second is for a list that lies one folder down, with its files.
        for key in stem, stem.partition("/")[2], os.path.basename(stem), name:
            if key in ids_of:
                return ids_of[key], False
        return [], False

    return attach_files(clips, root, skipped, match), classes

# To add a data set, write a reader (root, skipped=None) -> (clips, classes), like `read_list`, and
# name a file that only such a data set has. The first match counts, so put yours on top. Splits are
# called train and eval, and an id, which may be a path, occurs once. RECIPES in 13 sets defaults.
READERS = {"list": ("clips.csv", read_list),
           "audioset": ("*eval_segments.csv", read_audioset),
           "ucf101": ("classInd.txt", read_ucf101),
           "release": ("*annotation.json", read_annotations),
           "activitynet": ("activity_net*.json", read_annotations),
           "folder": ("train", read_folder)}

def find_layout(root: str | Path) -> str:
    """Returns "demo" or the key of READERS that fits a folder. Raises InputError if none does."""
    if str(root) == "demo":
        return "demo"
    if not os.path.isdir(root):
        raise InputError(f"{root}: there is no such folder; name the one that the lists lie in")
    for layout, (sign, _) in READERS.items():
        found = [*Path(root).glob(sign), *Path(root).glob(f"[!.]*/{sign}")]
        if layout == "release" and found and b'"segment"' in found[0].read_bytes():
            return "activitynet"                        # the release of its segments
        if found:
            return layout
    signs = ", ".join(f"{sign} ({name})" for name, (sign, _) in READERS.items())
    raise InputError(f"{root}: none of {signs} is in it or one folder below")

def read_data(root: str | Path, split: str = "balanced", fold: int = 1,
              skipped: list | None = None) -> tuple[str, list[Clip], list[str]]:
    """Finds out which data set lies in `root` and reads it: (layout, clips, class names).

    split, fold  for AudioSet and UCF-101
    Raises InputError if there is no known layout, a list cannot be read or a split is empty.
    """
    skipped = [] if skipped is None else skipped
    layout = find_layout(root)
    choice = {"audioset": {"split": split}, "ucf101": {"fold": fold}}.get(layout, {})
    try:
        clips, classes = READERS[layout][1](root, skipped=skipped, **choice)
    except InputError:
        raise
    except (OSError, LookupError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise InputError(f"{root}: the {layout} lists cannot be read: "
                         f"{type(error).__name__}: {error}") from error
    splits = sorted({clip.split for clip in clips})
    if splits != ["eval", "train"]:
        raise InputError(f"{root}: files of the splits train and eval are needed, those of "
                         f"{splits} are here; {coverage(clips, skipped)}")
    return layout, clips, classes

def load_stream(clip: Clip, kind: str, fps: float = 4.0, side: int = 128) -> Tensor:
    """Decodes a clip's part of its file, which may be the whole recording or already cut.

    kind  "audio" or "video"; the rest is as in `decode_audio` and `decode_video`
    Raises InputError as these do, or if the clip has no such file or it is unclear what it holds.
    """
    path = clip.audio if kind == "audio" else clip.video
    start, end = clip.start, clip.end
    if path is None:
        raise InputError(f"{clip.id}: no file with its {kind}")
    if path.lower().endswith(".hdf5"):
        return decode_hdf5(path, side)
    if clip.cut:
        start, end = 0.0, None
    elif clip.cut is None and start > 0 and end is not None and is_cut(path, kind, start, end):
        start, end = 0.0, end - start
    if kind == "audio":
        return decode_audio(path, start, end)
    return decode_video(path, start, end, fps, side)

def is_cut(path: str, kind: str, start: float, end: float) -> bool:
    """Returns whether a file holds [start, end) of a recording or, by its length, all of it."""
    # Packets tell the length, since headers of piped files lack it and FFmpeg guesses MP3's.
    length, segment = 0.0, end - start
    with open_stream(path, kind) as stream:
        origin = (stream.container.start_time or 0) / av.time_base
        for packet in stream.container.demux(stream):
            if packet.pts is not None:
                stop = (packet.pts + (packet.duration or 0)) * packet.time_base
                length = max(length, float(stop) - origin)
            if length > end:
                break
    longer, missing = length - segment, end - length
    margin = max(0.5, 0.1 * segment)
    if longer <= margin and longer < missing:
        return True
    if missing <= margin or longer > segment:
        return False
    raise InputError(f"{path}: its {length:.1f} s may be the recording or the part from {start:g} "
                     f"to {end:g} s; put these two times into its name")

# -------------------- 6. Demo: generated shapes and calls as media files --------------------
def demo_shape(event: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Tells which points (x, y), in units of its radius, belong to the shape of an event."""
    if event < 0:
        return np.abs(y) < 0.15                             # a bar across the picture
    angle = np.arctan2(y, x)
    outlines = [1.0,                                                    # disc
                0.62 / np.cos(angle % (2 * np.pi / 3) - np.pi / 3),     # triangle
                0.78 / np.cos(angle % (np.pi / 2) - np.pi / 4),         # square
                0.75 + 0.45 * np.cos(5 * angle),                        # star
                0.75 + 0.5 * np.cos(2 * angle)]                         # peanut
    depth = np.hypot(x, y) / outlines[event // 4]           # 0 in the centre, 1 on the outline
    fillings = [depth < 1, depth > 0.6, np.cos(8 * x) > 0,              # full, ring, stripes
                np.cos(6 * x) * np.cos(6 * y) > 0]                      # checks
    return (depth < 1) & fillings[event % 4]

def demo_picture(events: dict, rng: np.random.Generator, easy: bool = False) -> np.ndarray:
    """Draws the shapes of {event: contrast}, a teacher's `easy`, into noise: (48, 48, 3) uint8."""
    hues = 2 * np.array([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)]) - 1
    ground = rng.uniform(100, 156, 3)
    picture = rng.normal(ground, 8, (48, 48, 3))
    for event, contrast in events.items():
        radius = rng.uniform(10, 12.5) * (1.5 if easy else 1)
        centre = rng.uniform(radius, 48 - radius, (2, 1, 1))
        down, right = (np.mgrid[:48, :48] - centre) / radius
        turn = rng.uniform(-0.4, 0.4)                       # radians
        x = right * np.cos(turn) + down * np.sin(turn)
        y = down * np.cos(turn) - right * np.sin(turn)
        color = ground + rng.choice([-128, 128]) * rng.uniform(0.4, 1, 3)
        if easy and event >= 0:
            color = ground + hues[event % 4] * rng.uniform(50, 100)
        inside = demo_shape(event, x, y)
        picture[inside] += contrast * (color - picture[inside])
    return picture.clip(0, 255).astype(np.uint8)

def demo_sound(events: dict[int, float], rng: np.random.Generator, length: float) -> np.ndarray:
    """Mixes the calls of {event: loudness} into `length` seconds of noise: (samples,) int16."""
    passed = np.linspace(0, 1, round(32000 * length))       # 1 at the end of the sound
    sound = rng.standard_normal(len(passed))
    for event, loudness in events.items():
        pitch = 300 * 1.4 ** (event // 4)                   # 300 to 1152 Hz
        if event < 0:
            pitch = rng.choice([110, 5000])                 # far below or above the classes'
        pitch *= rng.uniform(0.95, 1.05)
        begin = rng.uniform(0, 0.35)
        call = (passed - begin) / rng.uniform(0.5, 0.65)    # 0 to 1 during the call
        pulses = [1, 2, 3, 5][event % 4]                    # the rhythm
        envelope = loudness * np.abs(np.sin(np.pi * pulses * call))
        envelope[(call < 0) | (call > 1)] = 0
        for overtone in 1, 2, 3:
            phase = rng.uniform(0, 2 * np.pi)
            wave = np.sin(2 * np.pi * overtone * pitch * length * passed + phase)
            sound += rng.uniform(0.2, 1) * envelope * wave
    sound *= 32767 / np.abs(sound).max()                    # the same peak in every clip
    return sound.astype(np.int16)

def write_media(path: Path, sound: np.ndarray, picture: np.ndarray) -> None:
    """Writes up to a second of sound and one picture, both uncompressed, as an .avi file."""
    with av.open(str(path), "w") as container:
        audio = container.add_stream("pcm_s16le", rate=32000, layout="mono")
        video = container.add_stream("rawvideo", rate=1, width=48, height=48, pix_fmt="bgr24")
        container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        block = av.AudioFrame.from_ndarray(sound[None], format="s16", layout="mono")
        block.sample_rate = 32000
        container.mux(audio.encode(block) + audio.encode(None))     # None: what it still holds

def demo_clip(first: int, student: str, tags: bool, noise: float, mismatch: float,
              rng: np.random.Generator) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Returns labelled events, sound and picture of a clip with event `first`; see `write_demo`."""
    others = rng.permutation(20)
    others = others[others != first].tolist()
    labelled = [first]
    if tags and rng.random() < 0.4:
        labelled.append(others.pop())
    contrast = rng.uniform(0.35, 0.8)
    unclear = dict.fromkeys(others[:rng.integers(3)], contrast / 2)
    unclear.update(dict.fromkeys(labelled, contrast))       # drawn last, over the others
    shown = labelled
    if rng.random() < mismatch:
        shown = others[-len(labelled):] if rng.random() < 0.5 else []
    if rng.random() < noise:
        shown = shown + [-1]                                # belongs to no class
    if student == "video":
        clear = dict.fromkeys(shown, rng.uniform(0.3, 0.9))
        return labelled, demo_sound(clear, rng, 1.0), demo_picture(unclear, rng)
    clear = dict.fromkeys(shown, rng.uniform(0.8, 1))
    faint = {event: loudness / 2 for event, loudness in unclear.items()}
    return labelled, demo_sound(faint, rng, 0.65), demo_picture(clear, rng, easy=True)

def write_demo(root: Path, student: str, tags: bool, noise: float, mismatch: float, seed: int,
               train: int = 400, evaluation: int = 1000) -> None:
    """Writes a generated data set into the new folder `root`: .avi files and clips.csv.

    There are 20 classes of events, five kinds in four patterns each. A picture shows an event as a
    shape (outline, filling), a sound plays it as a call (pitch, rhythm). Place, size, colour and
    loudness say nothing, but a teacher's shapes are larger, and their colour tells the filling, so
    that few clips are enough. Sound lasts a second, or 0.65 s where it is the student's. A clip has
    one labelled event, with `tags` two in four of ten clips; all classes are equally frequent.
    student   "audio" or "video": this modality always shows the labelled event, but faintly, and
              up to two events of other classes, half as strong, beside it
    The other modality is the teacher's. It is clear, but faulty:
    noise     share of all clips into which an event that belongs to no class is mixed
    mismatch  share of the training clips that show other events instead, or, equally often, none
    """
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True)
    rows = ["id,split,labels"]
    order = np.concatenate([rng.permutation(train), rng.permutation(evaluation)])
    for i, number in enumerate(order):
        split, faulty = ("train", mismatch) if i < train else ("eval", 0.0)
        labelled, sound, picture = demo_clip(number % 20, student, tags, noise, faulty, rng)
        write_media(root / f"{i:04d}.avi", sound, picture)
        names = ";".join(f"event {event:02d}" for event in labelled)
        rows.append(f"{i:04d},{split},{names}")
    save(root / "clips.csv", "\n".join(rows))

# -------------------- 7. Cache and views: decoded once, read in windows --------------------
class Views(NamedTuple):
    """Says what a network sees of a clip: windows of one size."""
    kind: str                   # "audio" or "video"
    frames: int = 16            # per window (authors)
    fps: float = 4.0            # frames a second (authors)
    size: int = 112             # side of the square window in pixels (authors)
    seconds: float = 10.0       # of sound per window (PANNs)
    side: int = 240             # shorter side of the cached frames in pixels (authors' data)
    crop_area: float = 0.25     # smallest part of a frame that a training window shows (authors)
    flip: bool = True           # mirror half of the training windows (authors)
    strong: bool = False        # grey, full contrast; in training also inverted, turned (ours)
    resize: tuple[int, int] | None = None   # (H, W) to scale to before a centre crop

def pack(stream: Tensor) -> Tensor | dict:
    """Packs sound as int16, or frames (T, 3, H, W) as JPEGs, joined, with the bytes of each."""
    if stream.is_floating_point():
        return (stream.clamp(-1, 1) * 32767).round().short()
    jpegs = []
    for frame in stream.permute(0, 2, 3, 1).numpy():
        jpeg = io.BytesIO()
        Image.fromarray(frame).save(jpeg, "JPEG", quality=90)
        jpegs.append(torch.frombuffer(jpeg.getbuffer(), dtype=torch.uint8))
    return {"jpegs": torch.cat(jpegs), "sizes": [len(jpeg) for jpeg in jpegs]}

def read_cached(file: str | Path, kind: str) -> Sequence[Tensor]:
    """Maps int16 samples or each frame's JPEG into memory. Raises InputError if it is damaged."""
    try:
        content = torch.load(file, mmap=True, weights_only=True)
        return content["jpegs"].split(content["sizes"]) if kind == "video" else content
    except Exception as error:                      # the loader raises a dozen kinds
        raise InputError(f"{file}: it is damaged; the next start decodes the clip again") from error

def decode_jpegs(jpegs: Sequence[Tensor], file: str) -> Tensor:
    """Decodes pictures of a cache file: (T, 3, H, W) uint8. Raises InputError if one is damaged."""
    try:
        pictures = [np.asarray(Image.open(io.BytesIO(jpeg.numpy()))) for jpeg in jpegs]
    except OSError as error:
        raise InputError(f"{file}: a picture in it is damaged; delete it") from error
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

def decode_clip(clip: Clip, views: list[Views], cache: Path) -> tuple[list[str], str]:
    """Decodes a clip's streams into the cache, unless they are there and whole.

    views  the student's and perhaps the teacher's; evaluation clips may lack the latter's modality
    Returns the cache files, named by all that they depend on, and why the clip is unusable, or "".
    Raises InputError if memory or the cache's disk is full, which is not the clip's fault.
    """
    files = [""] * len(views)
    for k, view in enumerate(views):
        path, content = getattr(clip, view.kind), None
        try:
            if path is None:
                raise InputError(f"missing: {clip.id} has no file with {view.kind}")
            status = os.stat(path)
            depends = [2, view.kind, os.path.abspath(path), clip.start, clip.end, clip.cut]
            depends += [status.st_size, status.st_mtime_ns]     # raise the 2 if decoding changes
            if view.kind == "video":
                depends += [view.fps, view.side]
            name = hashlib.sha1(repr(depends).encode()).hexdigest()
            file = cache / name[:2] / f"{name}.pt"
            try:
                read_cached(file, view.kind)
            except InputError:
                content = pack(load_stream(clip, view.kind, view.fps, view.side))
        except (InputError, OSError) as error:
            cause = error.__cause__             # FFmpeg says "no memory" of damaged files, too
            if isinstance(cause, MemoryError) and not isinstance(cause, av.error.FFmpegError):
                raise
            if clip.split == "train" or k == 0:
                return files, str(error)
            continue
        if content is not None:
            save(file, content)
        files[k] = str(file)
    return files, ""

def decode_all(clips: list[Clip], views: list[Views], cache: Path, workers: int) -> list[tuple]:
    """Does `decode_clip` for all clips, in a loader's workers and shared among the processes."""
    rank, world = process()
    loader = DataLoader(clips[rank::world], batch_size=None, num_workers=workers,
                        collate_fn=partial(decode_clip, views=views, cache=cache))
    return join_shares(list(progress(loader, "decoding")))

def even_windows(n: int, size: int = 16, count: int = 3) -> list[list[int]]:
    """Returns the indices of up to `count` evenly spread windows of n frames (authors).

    If fewer than `count` are full, the next one, which the frames do not fill, is looped.
    """
    # n - 1 - size: the authors count one frame too few, so the last window may end early (kept).
    stride = max(1, math.ceil((n - 1 - size) / max(count - 1, 1)))
    full = max((n - size) // stride + 1, 0)
    return sliding_windows(n, size, stride)[:min(full + 1, count)]

def sliding_windows(n: int, size: int = 16, stride: int = 16) -> list[list[int]]:
    """Returns the indices of all windows of n frames; short ones loop (authors' final test)."""
    windows = []
    for start in range(0, n, stride):
        loop = min(size, n - start)
        windows.append([start + k % loop for k in range(size)])
    return windows

class Data(NamedTuple):
    """Holds a decoded data set as the student, or the teacher, sees it."""
    clips: list[Clip]
    classes: list[str]
    tags: bool                  # may a clip have several labels?
    train: list[int]            # indices into clips
    eval: list[int]
    views: Views
    files: list[str]            # of each clip in the cache; "" where a clip lacks this stream

    def labels(self, indices: list[int]) -> Tensor:
        """Returns class indices (n,) of some clips or, for tags, multi-hot labels (n, C)."""
        if not self.tags:
            return torch.tensor([self.clips[i].labels[0] for i in indices])
        labels = torch.zeros(len(indices), len(self.classes))
        for row, i in zip(labels, indices):
            row[list(self.clips[i].labels)] = 1.0
        return labels

    def loader(self, indices: list[int], mode: str, batch_size: int, workers: int, seed: int = 0,
               teacher: Tensor | None = None) -> DataLoader:
        """Returns a loader: shuffled whole batches for "train", otherwise all clips in order.

        Clips that do not fill a last batch are left out, unless it is the only batch. Under
        torchrun each process gets a part of every training batch, `batch_size` clips.
        """
        rank, world = process()
        dataset, sampler = ClipViews(self, indices, mode, seed, teacher), None
        if workers > 0:
            dataset.epoch.share_memory_()
        if mode == "train":
            sampler = DistributedSampler(dataset, world, rank, seed=seed, drop_last=True)
        return DataLoader(dataset, batch_size, sampler=sampler, num_workers=workers,
                          collate_fn=join_clips, persistent_workers=workers > 0,
                          pin_memory=torch.cuda.is_available(),
                          generator=torch.Generator(),      # or it would draw from SpecAugment's
                          drop_last=mode == "train" and len(indices) >= batch_size * world)

class ClipViews(Dataset):
    """Reads windows: item n is (clip index, windows (count, ...), label, teacher's embedding).

    mode "train"  gives one random window, which follows from seed, epoch and clip alone
    mode "val"    gives three even windows of video (authors, while training)
    mode "test"   gives consecutive windows (authors, final test)
    For sound, both give even windows that cover the clip but for 5 % of a window (ours).
    Clips that are shorter than a window are looped. Without a teacher, embeddings are empty.
    """
    def __init__(self, data: Data, indices: list[int], mode: str, seed: int = 0,
                 teacher: Tensor | None = None):
        self.data, self.indices, self.mode, self.seed = data, indices, mode, seed
        self.teacher = torch.zeros(len(data.clips), 0) if teacher is None else teacher
        self.epoch = torch.zeros((), dtype=torch.int64)     # a tensor, which workers can share
        views, steps = data.views, []
        self.length = views.frames if views.kind == "video" else round(views.seconds * 32000)
        if views.strong:
            steps += [v2.Grayscale(3), v2.RandomAutocontrast(p=1.0)]
        if views.strong and mode == "train":
            steps += [v2.RandomInvert(), v2.RandomRotation(15)]
        if mode == "train":
            steps += [v2.RandomResizedCrop(views.size, scale=(views.crop_area, 1.0)),
                      v2.RandomHorizontalFlip(0.5 * views.flip)]
        else:
            steps += [v2.Resize(views.resize or views.size), v2.CenterCrop(views.size)]
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.indices)

    def starts(self, n: int) -> list[int]:
        """Returns where the windows of a stream of n frames or samples begin."""
        if self.mode == "train":
            return [int(torch.randint(max(n - self.length, 0) + 1, ()))]
        if self.data.views.kind == "audio":         # up to 5 % of a window may be missed
            count = max(1, math.ceil(n / self.length - 0.05))
            return np.linspace(0, n - self.length, count).round().astype(int).tolist()
        windows = sliding_windows(n, self.length, self.length)
        if self.mode == "val":
            windows = even_windows(n, self.length)
        return [window[0] for window in windows]

    def __getitem__(self, n: int) -> tuple[int, Tensor, Tensor, Tensor]:
        i, windows = self.indices[n], []
        file, kind = self.data.files[i], self.data.views.kind
        stream = read_cached(file, kind)
        with torch.random.fork_rng(devices=[]):     # draws nothing from SpecAugment's generator
            # The factor keeps seeds, epochs and up to a million clips from sharing numbers.
            epoch_seed = 1_000_003 * self.seed + int(self.epoch)
            torch.default_generator.manual_seed(1_000_003 * epoch_seed + i)
            for start in self.starts(len(stream)):
                window = stream[start:start + self.length]
                if kind == "video":                 # one draw for all its frames
                    window = self.transform(decode_jpegs(window, file))
                looped = torch.arange(self.length) % len(window)        # if it is too short
                windows.append(window[looped])
        return i, torch.stack(windows), self.data.labels([i])[0], self.teacher[i]

def join_clips(items: list) -> tuple[Sequence[int], Tensor, list[int], Tensor, Tensor]:
    """Joins items of `ClipViews`: indices, windows, windows per clip, labels, embeddings."""
    indices, windows, labels, teacher = zip(*items)
    counts = [len(part) for part in windows]
    windows = torch.cat(windows)
    if torch.utils.data.get_worker_info() is not None:
        windows.share_memory_()         # raises if there is no room; the queue would only hang
    return indices, windows, counts, default_collate(labels), default_collate(teacher)

# -------------------- 8. Metrics (between 0 and 1, except d') --------------------
def check_scores(scores: Tensor) -> Tensor:
    """Returns scores as a tensor. Raises InputError if one is NaN, which would rank highest."""
    scores = torch.as_tensor(scores)
    if scores.isnan().any():
        raise InputError("scores or embeddings hold NaN (not a number), so they cannot be ranked")
    return scores

def by_column(scores: Tensor, labels: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the ascending scores of positives and negatives for each column with a positive."""
    columns = check_scores(scores).mT.numpy(force=True)
    positive = torch.as_tensor(labels).mT.numpy(force=True) > 0
    for column, own in zip(columns, positive, strict=True):
        if own.any():
            yield np.sort(column[own]), np.sort(column[~own])

def mean_average_precision(scores: Tensor, labels: Tensor) -> float:
    """Returns the mean average precision of scores (N, C) over the classes that have a positive.

    Labels (N, C) are 0 or 1. Equal scores share a threshold, as in scikit-learn. Raises ValueError
    if no class has a positive or a score is NaN.
    """
    precisions = []
    for hits, misses in by_column(scores, labels):
        true = len(hits) - np.searchsorted(hits, hits)          # that score at least as high
        false = len(misses) - np.searchsorted(misses, hits)
        precisions.append(np.mean(true / (true + false)))
    if not precisions:
        raise ValueError(f"none of {labels.shape[1]} classes has a positive in {len(labels)} clips")
    return statistics.fmean(precisions)

def mean_auc(scores: Tensor, labels: Tensor) -> float:
    """Returns the mean area under the ROC curve of scores (N, C); ties count half.

    The mean is over the classes that have both positives and negatives; nan if no class has.
    """
    areas = []
    for hits, misses in by_column(scores, labels):
        if len(misses) > 0:
            below = np.searchsorted(misses, hits, side="left")
            not_above = np.searchsorted(misses, hits, side="right")
            areas.append(np.mean(below + not_above) / 2 / len(misses))
    return statistics.fmean(areas or [math.nan])

def topk_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Returns the share of clips whose label (N,) is among the k highest of their scores (N, C)."""
    scores = check_scores(scores)
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    wanted = torch.as_tensor(labels).reshape(len(scores), 1)
    return (best == wanted).any(1).double().mean().item()

def retrieval_metrics(queries: Tensor, gallery: Tensor, query_labels: Tensor,
                      gallery_labels: Tensor, ks: Sequence[int] = (1, 5, 10, 20, 50),
                      topk: int = 500) -> dict[str, float]:
    """Ranks the gallery (G, D) by cosine to each query (Q, D); clips of the query's label are hits.

    Labels are class indices (Q,), (G,). A query that is also in the gallery finds itself. Among
    equals, misses come first. Raises ValueError without queries, for NaN or if labels do not fit.
    topk          length to which mAP_released cuts each ranking (authors: 100 or 500)
    R@k           share of queries with a hit among the k nearest clips
    mAP           mean of the average precision over the whole ranking; 0 for a query without hits
    mAP_released  the released scripts' variant: cut at `topk`, queries without a hit left out
    """
    queries, gallery = torch.as_tensor(queries), torch.as_tensor(gallery)
    wanted, known = torch.as_tensor(query_labels), torch.as_tensor(gallery_labels)
    if not len(queries) or (wanted.shape, known.shape) != (queries.shape[:1], gallery.shape[:1]):
        raise ValueError(f"{len(queries)} queries have labels {tuple(wanted.shape)}, {len(gallery)}"
                         f" gallery clips {tuple(known.shape)}; pass one class index each")
    first, precisions, released = [], [], []
    for block, labels in zip(queries.split(256), wanted.split(256), strict=True):
        distances = -cosine_matrix(block, gallery).T        # (G, 256), in parts to save memory
        for hits, misses in by_column(distances, known[:, None] == labels):
            count = np.arange(1, len(hits) + 1)
            ranks = count + np.searchsorted(misses, hits, side="right")
            precision = count / ranks
            first.append(ranks[0])
            precisions.append(precision.mean())
            if ranks[0] <= topk:
                released.append(precision[ranks <= topk].mean())
    first = np.array(first)
    found = {f"R@{k}": np.sum(first <= k).item() / len(queries) for k in ks}
    found["mAP"] = np.sum(precisions).item() / len(queries)
    found["mAP_released"] = np.mean(released or 0.0).item()
    return found

def score(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Scores probabilities (N, C): by top-1 and top-5 for classes (N,), by mAP, AUC, d' for tags.

    d' is sqrt(2) * probit(AUC). AUC and d' are left out if no tag has positives and negatives.
    """
    if labels.ndim == 1:
        return {"top1": topk_accuracy(scores, labels, 1), "top5": topk_accuracy(scores, labels, 5)}
    metrics = {"mAP": mean_average_precision(scores, labels)}
    auc = mean_auc(scores, labels)
    if math.isfinite(auc):
        within = min(max(auc, 1e-9), 1 - 1e-9)              # the probit of 0 and 1 is infinite
        probit = statistics.NormalDist().inv_cdf(within)
        metrics |= {"AUC": auc, "d_prime": math.sqrt(2) * probit}
    return metrics

def score_classes(scores: Tensor, labels: Tensor, classes: list[str]) -> dict[str, float]:
    """Returns the accuracy of each class, or each tag's average precision, the lowest first.

    Takes what `score` takes. Classes without a clip are left out.
    """
    found = {}
    for k, name in enumerate(classes):
        own = labels == k if labels.ndim == 1 else labels[:, k] > 0
        if labels.ndim == 1 and own.any():
            found[name] = topk_accuracy(scores[own], labels[own])
        elif own.any():
            found[name] = mean_average_precision(scores[:, [k]], labels[:, [k]])
    return dict(sorted(found.items(), key=lambda item: item[1]))

# -------------------- 9. Checkpoints --------------------
def save(path: Path, content: object) -> None:
    """Saves tensors and plain Python (.pt), JSON or text; if it cannot, raises InputError."""
    part = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pt":
            torch.save(content, part)
        else:
            text = content if isinstance(content, str) else json.dumps(content, indent=1)
            part.write_text(text, "utf-8", "surrogateescape")       # of names not in UTF-8
        os.replace(part, path)                      # never half a file under that name
    except (OSError, RuntimeError) as error:        # torch.save: a RuntimeError if it is full
        with suppress(OSError):
            part.unlink()
        raise InputError(f"{path} cannot be written; is the disk full? ({error})") from error

def network_arguments(state: dict[str, Tensor]) -> dict:
    """Reads the arguments of `make_network` off a state dict of VideoNet or AudioNet."""
    if "fc_audioset.weight" in state:
        stages = sum(f"conv_block{i}.conv1.weight" in state for i in range(1, 7))
        dim = len(state.get("fc1.weight", [])) or None
        return {"kind": "audio", "num_classes": len(state["fc_audioset.weight"]), "dim": dim,
                "width": len(state["conv_block1.conv1.weight"]), "stages": stages}
    stages = [name[:5] for name in state if name.endswith(".conv1.temporal_conv.weight")]
    blocks = [stages.count(f"conv{k}") for k in (2, 3, 4, 5)]
    return {"kind": "video", "num_classes": len(state["cls.weight"]), "blocks": blocks,
            "width": len(state["conv1.temporal_conv.weight"])}

def strip_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefixes of DDP, FSDP, torch.compile and averaging, and PANNs' log-mel layers."""
    prefixes = {"module", "_orig_mod", "_fsdp_wrapped_module", "ema_model", "model"}
    stripped = {}
    for name, value in state.items():
        if name.endswith("extractor.melW") and len(value) != 513:
            raise ValueError("its log-mel is made for a sample rate other than 32 kHz")
        short = ".".join(part for part in name.split(".") if part not in prefixes)
        if "_extractor." not in name and name != "n_averaged":
            stripped[short] = value
    return stripped

def load_checkpoint(path: str | Path) -> dict:
    """Loads a checkpoint of this program, the authors or PANNs on the CPU. No code in it is run.

    Keys: student and filter (state dicts; the filter's may be empty), network (arguments of
    `make_network`), classes (names, or None), task (or None), method, seed, epoch and settings.
    Raises InputError if it is none of these or the student's weights do not fit or are not finite.
    """
    # An empty list stands for each object but tensors, as the authors' scheduler, PANNs' sampler.
    other = type("Other", (list,), {"__init__": lambda *_: None, "__setstate__": lambda *_: None})
    names = {"numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct",
             "numpy.core.multiarray.scalar", "_codecs.encode"}      # of PANNs' old format
    try:
        with open(path, "rb") as file:
            if file.read(1) not in (b"P", b"\x80"):         # of torch.save's two formats
                raise ValueError("torch.save has not written it; is it a web page or a text?")
        with suppress(ValueError):                          # the old format cannot be asked
            names.update(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        harmless = [(other, name) for name in names - {"collections.defaultdict"}]
        harmless.append((lambda _: {}, "collections.defaultdict"))
        with torch.serialization.safe_globals(harmless):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if "student" not in content:
            student = strip_names(content.get("state_dict") or content.get("model", content))
            noise_filter = strip_names(content.get("audio_state_dict", {}))
            content = {"student": student, "filter": noise_filter, "classes": None, "task": None,
                       "network": network_arguments(student), "epoch": content.get("epoch", 0),
                       "method": "xmkd" if noise_filter else "student", "seed": 0, "settings": {}}
        with torch.device("meta"):                          # names and shapes without memory
            network = make_network(**content["network"])
        network.load_state_dict(dict(content["student"]), assign=True)  # a copy: torch marks it
        for name, value in content["student"].items():
            if not value.isfinite().all():
                raise ValueError(f"{name} holds numbers that are infinite or NaN")
        return content
    except Exception as error:                      # the loader raises a dozen kinds
        reason = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split())
        lacks = "it lacks " if isinstance(error, KeyError) else ""
        raise InputError(f"{path} is not a usable checkpoint of this program, the authors or PANNs "
                         f"({lacks}{reason[:200]})") from error

def restore(saved: dict, device: str) -> nn.Module:
    """Builds the network of a loaded checkpoint, in evaluation mode."""
    network = make_network(**saved["network"])
    network.load_state_dict(saved["student"])
    return network.to(device).eval()

# -------------------- 10. Training and evaluation --------------------
STUDENT_KIND = {"audio_tagging": "audio", "action_recognition": "video", "video_retrieval": "video"}
TEACHER_KIND = {"audio_tagging": "video", "action_recognition": "audio", "video_retrieval": "audio"}
# student: the labels alone; csc: xmkd without the filter; mnf: xmkd with one temperature.
METHODS = ("student", *Distiller.methods, "mnf", "xmkd")
log = logging.getLogger("xmkd")

def process() -> tuple[int, int]:
    """Returns this process's rank and the number of processes; without torchrun (0, 1)."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1

def join_shares(rows: list) -> list:
    """Waits for all processes and interleaves their rows: the first of each, then the second."""
    shares = [rows] * process()[1]
    if len(shares) > 1:
        dist.all_gather_object(shares, rows)
    joined = [None] * sum(map(len, shares))
    for rank, rows in enumerate(shares):
        joined[rank::len(shares)] = rows
    return joined

def save_once(path: Path, content: object) -> None:
    """Saves a file of a run folder; under torchrun, process 0 does it for all."""
    if process()[0] == 0:
        save(path, content)

def duration(seconds: float) -> str:
    """Says in words how long something takes, such as "40 s", "12 min" or "34 h"."""
    for unit, length in ("days", 24 * 3600), ("h", 3600), ("min", 60):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"

def progress(loader: DataLoader, what: str, rounds: int = 1) -> Iterator:
    """Yields a loader's batches; logs the pace and, for `rounds` such passes, the time left."""
    begun = time.time()
    shown = begun - 20                                      # first after 10 s, then every 30 s
    for done, batch in enumerate(loader, 1):
        yield batch
        if time.time() - shown > 30:
            shown = time.time()
            pace = (shown - begun) / done
            left = duration(pace * (rounds * len(loader) - done))
            where = f"{done:,} of {len(loader):,}"
            log.info(f"  {what}: {where}, {duration(pace)} each, {left} left")

def release_memory() -> None:
    """Gives back what was kept, see `keep_memory`, so that `memory_in_use` starts anew."""
    with suppress(AttributeError, OSError):         # another C library has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

def memory_in_use() -> float:
    """Returns the peak of the GPU's memory or, without one, what the process holds, in GB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9

class Machine(NamedTuple):
    """Says where and how networks run."""
    device: str = "cpu"
    amp: bool = False           # in bfloat16; needs a GPU
    workers: int = 0            # processes that load the clips

CPU = Machine()

@torch.no_grad()
def predict(network: nn.Module, data: Data, indices: list[int], machine: Machine = CPU,
            mode: str = "test") -> tuple[Tensor, Tensor]:
    """Returns probabilities (n, C) and embeddings (n, D) of clips, means over their windows.

    Under torchrun the processes share the work, and each returns all. The result is on the CPU.
    """
    rank, world = process()
    network.eval()
    prepare_views = Prepare().to(machine.device).eval()
    loader = data.loader(indices[rank::world], mode, 8, machine.workers)
    probabilities, embeddings = [], []
    for _, windows, counts, _, _ in progress(loader, "evaluating"):
        scores, pooled = [], []
        for part in windows.split(64):                              # a long clip has many windows
            inputs = prepare_views(part.to(machine.device))
            with torch.autocast(inputs.device.type, torch.bfloat16, enabled=machine.amp):
                features = network(inputs)
            logits = features.logits.float()
            scores.append(logits.sigmoid() if data.tags else logits.softmax(1))
            pooled.append(features.pooled.float())
        probabilities += [part.mean(0) for part in torch.cat(scores).cpu().split(counts)]
        embeddings += [part.mean(0) for part in torch.cat(pooled).cpu().split(counts)]
    return torch.stack(join_shares(probabilities)), torch.stack(join_shares(embeddings))

def evaluate(network: nn.Module, data: Data, machine: Machine = CPU,
             retrieval: bool = False) -> tuple[dict, dict]:
    """Returns the metrics and each class's own; `retrieval` also searches the training clips."""
    probabilities, queries = predict(network, data, data.eval, machine)
    labels = data.labels(data.eval)
    metrics = score(probabilities, labels)
    if retrieval:
        _, gallery = predict(network, data, data.train, machine)
        metrics = retrieval_metrics(queries, gallery, labels, data.labels(data.train)) | metrics
    return metrics, score_classes(probabilities, labels, data.classes)

def fit_probe(data: Data, teacher: Tensor) -> nn.Linear:
    """Fits a linear probe on the teacher's embeddings of the training clips, 50,000 at most."""
    some = data.train[::math.ceil(len(data.train) / 50_000)]
    return linear_probe(teacher[some], data.labels(some), len(data.classes))

def build(data: Data, method: str, seed: int, teacher: Tensor | None = None, device: str = "cpu",
          width: int = 64, lr: float = 3e-4, weight_decay: float = 5e-4,
          offset: float = 0.07) -> tuple:
    """Returns what a method trains, initialised by the seed: student, noise filter, optimizer."""
    torch.manual_seed(seed)
    kind, classes, dim = data.views.kind, len(data.classes), 8 * width
    head = {"dim": dim} if method == "teacher" and kind == "audio" else {}      # PANNs' head
    student = make_network(kind, classes, width, **head).to(device)
    if process()[1] > 1 and str(device).startswith("cuda"):
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    noise_filter, filter_lr = None, 1.0
    if method in ("xmkd", "mnf"):
        noise_filter = ModalityNoiseFilter(classes, dim, teacher_dim=teacher.shape[1]).to(device)
        filter_lr = 0.2                                             # authors
    elif method not in ("student", "teacher"):
        probe = fit_probe(data, teacher) if method == "kd" else None
        noise_filter = Distiller(method, classes, dim, teacher.shape[1], offset, probe).to(device)
    return student, noise_filter, make_optimizer(student, noise_filter, lr, weight_decay, filter_lr)

@torch.no_grad()
def diagnose(student: nn.Module, noise_filter: nn.Module | None, inputs: Tensor,
             teacher: Tensor | None) -> dict[str, float]:
    """Returns figures of one batch, in evaluation mode, that show whether training is stuck."""
    features = student.eval()(inputs)
    cosines = cosine_matrix(features.pooled, features.pooled).fill_diagonal_(0)
    pairs = max(1, len(inputs) * (len(inputs) - 1))
    figures = {"cosine": cosines.sum().item() / pairs}      # near 1: all clips look the same
    if isinstance(noise_filter, ModalityNoiseFilter):
        filtered = noise_filter.eval()(teacher, features.map)
        figures["gate"] = filtered.gate.mean().item()       # at 1, the whole teacher passes
        entropy = torch.special.entr(filtered.attention).sum(1).mean().item()
        most = math.log(max(2, features.map.shape[1]))      # log K
        figures["entropy"] = entropy / most                 # at 1, all positions count equally
    return figures

def train_epoch(loader: DataLoader, student: nn.Module, noise_filter: nn.Module | None,
                optimizer: torch.optim.Optimizer, device: str = "cpu", rounds: int = 1,
                **options) -> dict[str, float]:
    """Trains on each batch once; returns mean loss terms, `diagnose`'s figures, speed and memory.

    `rounds` epochs are left; `options` are those of `train_step`. Raises InputError, with the step
    and its clips, if a loss is not finite.
    """
    prepare_views = Prepare().to(device).train()
    steps, clips, begun = [], [], time.time()
    for indices, windows, _, labels, teacher in progress(loader, "training", rounds):
        windows, labels, teacher = [part.to(device, non_blocking=True)
                                    for part in (windows, labels, teacher)]
        terms = train_step(student, noise_filter, optimizer, prepare_views(windows), teacher,
                           labels, **options)
        steps.append(torch.stack(list(terms.values())))
        clips.append(indices)
    values = torch.stack(steps).cpu()                       # (steps, terms), fetched once an epoch
    for step, row in enumerate(values.tolist()):
        if not all(map(math.isfinite, row)):
            ids = ", ".join(loader.dataset.data.clips[i].id for i in clips[step])
            raise InputError(f"a loss is not finite in step {step + 1} of epoch "
                             f"{int(loader.dataset.epoch)}: {dict(zip(terms, row))}; lower --lr; "
                             f"the clips are {ids}")
    speed = len(steps) * len(clips[0]) * process()[1] / (time.time() - begun)
    figures = diagnose(student, noise_filter, prepare_views.eval()(windows), teacher)
    means = dict(zip(terms, values.mean(0).tolist()))
    return means | figures | {"clips_per_second": speed, "memory_gb": memory_in_use()}

def refuse_changes(option: str, path: Path, before: dict, now: dict) -> None:
    """Raises InputError that names what is no longer as it was when `path` was written."""
    for name, value in now.items():
        if before.get(name) != value:
            raise InputError(f"{option}: {name} was {before.get(name)} in {path} and is now {value}"
                             f"; keep it or give another {option.replace('resume', 'out')}")

def fit(data: Data, method: str, teacher: Tensor | None, out: Path, seed: int = 3,
        machine: Machine = CPU, epochs: int = 200, eval_every: int = 5, batch_size: int = 32,
        lr: float = 3e-4, weight_decay: float = 5e-4, width: int = 64, offset: float = 0.07,
        margin: float = 0.2, sparsity: float = 1e-3, compiled: bool = False, resume: bool = False,
        settings: dict | None = None) -> nn.Module:
    """Trains one network by one method and returns it as it is after the last epoch.

    method    one of METHODS, or "teacher": like "student", but sound gets PANNs' head
    teacher   (N, teacher_dim) embeddings of all clips of `data`; None for "student" and "teacher"
    settings  kept in the checkpoints beside those above; `resume` refuses others
    Writes config.json, log.jsonl (a row an epoch), last.pt and, if it evaluates, best.pt to `out`.
    An epoch depends on seed, epoch and number of processes alone, so resuming changes nothing.
    """
    release_memory()
    student, noise_filter, optimizer = build(data, method, seed, teacher, machine.device, width, lr,
                                             weight_decay, offset)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(0.75 * epochs)])   # authors
    modules = {"student": student, "filter": noise_filter or nn.Identity(),
               "optimizer": optimizer, "schedule": schedule}
    given = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay,
             "csc_offset": offset, "margin": margin, "sparsity": sparsity}
    settings, last = given | (settings or {}), out / "last.pt"
    about = {"method": method, "seed": seed, "task": settings.get("task"), "classes": data.classes,
             "clips": [len(data.train), len(data.eval)],
             "network": network_arguments(student.state_dict()), "settings": settings}
    history, best, begun = [], -1.0, time.time()
    if resume and last.exists():
        saved = load_checkpoint(last)
        refuse_changes("--resume", last, saved["settings"], settings)
        refuse_changes("--resume", last, saved, about)
        history, best = saved["history"], saved["best"]
        begun -= history[-1]["seconds"]
        for name, module in modules.items():
            module.load_state_dict(saved[name])
    if compiled:
        student.compile()
    versions = {"torch": str(torch.__version__), "av": av.__version__}
    save_once(out / "config.json", {**about, "versions": versions})
    rank, world = process()
    loader = data.loader(data.train, "train", batch_size // world, machine.workers, seed, teacher)

    for epoch in range(len(history) + 1, epochs + 1):
        torch.manual_seed((1_000_003 * seed + epoch) * world + rank)    # SpecAugment's
        loader.sampler.set_epoch(epoch)
        loader.dataset.epoch.fill_(epoch)                   # in place, for the workers
        row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
        row |= train_epoch(loader, student, noise_filter, optimizer, machine.device,
                           epochs + 1 - epoch, offset=offset, margin=margin, sparsity=sparsity,
                           calibrate=method != "mnf", amp=machine.amp)
        row["seconds"] = round(time.time() - begun, 1)
        history.append(row)
        schedule.step()

        is_best = False
        if data.eval and (epoch % eval_every == 0 or epoch == epochs):
            probabilities, _ = predict(student, data, data.eval, machine, "val")
            metrics = score(probabilities, data.labels(data.eval))
            row |= metrics
            value = list(metrics.values())[0]               # top1 or mAP
            is_best = value > best
            best = max(value, best)
            names = ["top1", "top5", "mAP", "AUC", "cls", "csc", "distill", "cosine"]
            figures = "  ".join(f"{name} {row[name]:.3f}" for name in names if name in row)
            log.info(f"  {method} s{seed}  epoch {epoch} of {epochs}  {figures}  "
                     f"{duration(row['seconds'])}")

        content = {**about, "epoch": epoch, "best": best, "history": history}
        content |= {name: module.state_dict() for name, module in modules.items()}
        if is_best:
            save_once(out / "best.pt", content)
        save_once(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in history))
        save_once(last, content)                            # last, because `resume` relies on it
    join_shares([])                                         # process 0 has written its files
    return student.eval()

# -------------------- 11. Teacher: one frozen embedding a clip --------------------
# Embeddings (teacher_dim,) are not normalised. Our networks' are >= 0, others' may be negative.
class KineticsTeacher(nn.Module):
    """Embeds frames prepared as for VideoNet with Kinetics-400's r2plus1d_18: (B, 512), >= 0.

    Raises OSError or RuntimeError if torchvision cannot download the weights.
    """
    def __init__(self):
        super().__init__()
        weights = R2Plus1D_18_Weights.KINETICS400_V1
        self.net = r2plus1d_18(weights=weights, progress=sys.stdout.isatty())
        self.net.fc = nn.Identity()
        self.ours = Prepare()
        self.theirs = weights.transforms()

    def forward(self, frames: Tensor) -> Features:
        frames = (frames * self.ours.std + self.ours.mean).transpose(1, 2)  # 0..1, (B, T, 3, H, W)
        frames = v2.functional.normalize(frames, self.theirs.mean, self.theirs.std)
        pooled = self.net(frames.transpose(1, 2))                   # (B, 512)
        return Features(pooled[:, None], pooled, pooled)            # nothing needs map and logits

def open_teacher(source: str, views: Views, device: str) -> tuple[nn.Module | None, Views]:
    """Returns the network --teacher asks for, or None if one must be trained, and its views."""
    if os.path.isfile(source):
        saved = load_checkpoint(source)
        if saved["network"]["kind"] != views.kind:
            raise InputError(f"--teacher {source} takes {saved['network']['kind']}; this --task "
                             f"needs one that takes {views.kind}")
        return restore(saved, device), views
    network, reason = None, "torchaudio has no pretrained network"
    if source == "auto" and views.kind == "video":
        try:
            network = KineticsTeacher() if process()[0] == 0 else None
        except (OSError, RuntimeError) as error:
            reason = f"r2plus1d_18 cannot be downloaded ({error})"
        if join_shares([network is not None])[0]:                   # process 0 has downloaded it
            views = views._replace(side=128, resize=(128, 171), size=112)   # as it was trained
            return (network or KineticsTeacher()).to(device), views
    if source == "auto":
        log.warning(f"warning: the teacher is trained from scratch and will be weaker:\n  {reason}")
    return None, views

def train_teacher(data: Data, out: Path, seed: int, epochs: int, machine: Machine,
                  **options) -> tuple[nn.Module, dict[str, float]]:
    """Trains a teacher on nine tenths of the training clips; returns its best epoch on the rest.

    A network that has memorised its clips would embed their labels, not their content. Its metrics
    on the evaluation clips that it can take come along; `options` are those of `fit`.
    """
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    shuffled = [data.train[k] for k in order.tolist()]
    tenth = max(1, len(shuffled) // 10)
    parts = data._replace(train=shuffled[tenth:], eval=shuffled[:tenth])
    log.info(f"training the teacher from scratch for {epochs} epochs")
    fit(parts, "teacher", None, out, seed, machine, epochs, 1, **options)
    best = load_checkpoint(out / "best.pt")
    log.info(f"teacher: epoch {best['epoch']} is best on {tenth} training clips it has not seen")
    network, metrics = restore(best, machine.device), {}
    known = [i for i in data.eval if data.files[i]]
    if known:
        metrics, _ = evaluate(network, data._replace(eval=known), machine)
    return network, metrics

def read_features(folder: str | Path, clips: list[Clip]) -> dict[str, Tensor]:
    """Reads `<clip id>.npy`, (D,) numbers each, anywhere below a folder: {clip id: embedding (D,)}.

    Clips with none or several are left out. Raises InputError if a file holds anything else.
    """
    exact, folded, rows = defaultdict(list), defaultdict(list), {}
    for path in map(Path, find_files(folder, embeddings=True)):
        whole = path.relative_to(folder).with_suffix("").as_posix()
        for name in {whole, path.stem}:
            exact[name].append(path)
            folded[name.lower()].append(path)
    for clip in clips:
        found = exact[clip.id] or folded[clip.id.lower()]
        if Path(folder, f"{clip.id}.npy") in found:
            found = [Path(folder, f"{clip.id}.npy")]
        if len(found) != 1:
            continue
        try:
            row = torch.from_numpy(np.load(found[0], allow_pickle=False)).float()
            if row.ndim != 1 or not row.isfinite().all():
                raise ValueError(f"expected finite numbers (D,), got {tuple(row.shape)}")
        except (OSError, EOFError, ValueError, TypeError) as error:
            raise InputError(f"{found[0]}: it holds no embedding: {error}") from error
        rows[clip.id] = row
    lengths = sorted({len(row) for row in rows.values()})
    if len(lengths) > 1:
        raise InputError(f"{folder}: embeddings have the lengths {lengths}; give one network's")
    return rows

def given_teacher(args, clips: list[Clip]) -> tuple[dict | None, dict]:
    """Returns the embeddings of a folder, the release, a teacher.pt or, on --resume, this run's.

    They are {clip id: embedding}, or None if a network has to embed the clips; what makes them
    ("kind") and its "metrics" come along. Raises InputError if the settings were others.
    """
    path, own = Path(args.teacher), Path(args.out, "teacher.pt")
    if args.teacher in ("auto", "scratch"):
        path = Path(os.devnull)                     # and no folder that happens to have this name
    resumed = args.resume and own.exists()
    if resumed:
        path = own
    elif args.teacher == "auto" and find_layout(args.data) in ("release", "activitynet"):
        if find_files(args.data, embeddings=True):  # the authors publish them with their lists
            path = Path(args.data)
    if path.is_dir():
        return read_features(path, clips), {"kind": f"embeddings in {path}", "metrics": {}}
    if path.name != "teacher.pt":
        return None, {"kind": f"network ({args.teacher})", "metrics": {}}
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        rows = dict(zip(saved["ids"], saved["embeddings"]))
        about = {"kind": saved["kind"], "metrics": saved["metrics"]}
        before = saved["settings"]
    except Exception as error:                      # the loader raises a dozen kinds
        raise InputError(f"{path} is not the teacher.pt of a run; give another") from error
    if resumed:
        refuse_changes("--resume", path, before, settings_of(vars(args)))
        return rows, about
    names = ["data", "split", "fold", "per_class", "noise", "mismatch"]     # of the same clips
    if args.data == "demo" or args.per_class:
        names.append("seed")
    if STUDENT_KIND[before["task"]] != STUDENT_KIND[args.task]:
        names.append("task")
    refuse_changes("--teacher", path, before, {name: vars(args)[name] for name in names})
    return rows, {**about, "metrics": {}}           # its evaluation clips may have been others

def leave_out(clips: list[Clip], rows: dict, skipped: list) -> list[Clip]:
    """Returns the clips without those to train on that `rows` lacks, which go into `skipped`."""
    lacking = [clip for clip in clips if clip.split == "train" and clip.id not in rows]
    skipped += [(clip.id, "missing: the teacher has no embedding or several") for clip in lacking]
    kept = [clip for clip in clips if clip.split == "eval" or clip.id in rows]
    if all(clip.split == "eval" for clip in kept):
        raise InputError(f"--teacher has no embedding of any of the {len(lacking):,} training clips"
                         f", such as {lacking[0].id}; its names must be the clips' ids")
    return kept

def embed_clips(network: nn.Module, data: Data, machine: Machine = CPU) -> dict[str, Tensor]:
    """Embeds all clips of `data` that have the network's modality: {clip id: embedding (D,)}."""
    log.info("embedding the clips")
    known = [i for i in data.train + data.eval if data.files[i]]
    _, embeddings = predict(network, data, known, machine)
    return {data.clips[i].id: row for i, row in zip(known, embeddings)}

def score_probe(data: Data, teacher: Tensor) -> dict[str, float]:
    """Scores a linear probe on the teacher's embeddings of the evaluation clips that have one."""
    known = [i for i in data.eval if teacher[i].any()]
    if not known:
        return {}
    logits = fit_probe(data, teacher)(teacher[known])
    return score(logits.sigmoid() if data.tags else logits.softmax(1), data.labels(known))

# -------------------- 12. Prediction on files --------------------
def list_files(paths: list[str], kind: str) -> list[str]:
    """Lists the media files named and those in folders, except sound files if video is needed."""
    files, endings = [], MEDIA_FILES if kind == "audio" else FILM_FILES + FRAME_FILES
    for path in paths:
        if os.path.isdir(path):
            files += [file for file in find_files(path) if file.lower().endswith(endings)]
        else:
            files.append(path)
    if not files:
        raise InputError(f"{', '.join(paths)}: no media file with {kind}; known endings are "
                         f"{' '.join(endings)}")
    return files

def predict_files(saved: dict, paths: list[str], folder: str | None, views: Views, cache: Path,
                  machine: Machine) -> None:
    """Prints the five likeliest classes of each file or, with a `folder`, its five nearest clips.

    `saved` is a loaded checkpoint. Raises InputError in the end if a file could not be used.
    """
    kind, count = saved["network"]["kind"], saved["network"]["num_classes"]
    names = saved["classes"] or [f"class {k}" for k in range(count)]
    files = list_files(paths, kind)
    gallery = list_files([folder], kind) if folder else []
    clips = [Clip(path, (0,), "eval", path, path, cut=True) for path in files + gallery]
    decoded = decode_all(clips, [views], cache, machine.workers)
    reasons = {clip.id: reason for clip, (_, reason) in zip(clips, decoded) if reason}
    clips = [clip for clip in clips if clip.id not in reasons]
    cached = [found[0] for found, reason in decoded if not reason]
    tags = (saved["task"] or f"{kind}_tagging") == "audio_tagging"      # PANNs name no task
    data = Data(clips, names, tags, [], list(range(len(clips))), views, cached)
    row = {clip.id: k for k, clip in enumerate(clips)}          # of a file in the results
    if clips:
        scores, embeddings = predict(restore(saved, machine.device), data, data.eval, machine)
    if gallery:
        names = [path for path in gallery if path in row]
        if not names:
            raise InputError(f"--gallery {folder}: no clip can be used: {decoded[-1][1]}")
        scores = cosine_matrix(embeddings, embeddings[[row[path] for path in names]])

    for path in files:
        print(path)
        if path in reasons:
            print(f"  error: {reasons[path].removeprefix(f'{path}: ')}")
            continue
        likeliest = scores[row[path]].argsort(descending=True).tolist()
        if gallery:                                             # no file is its own neighbour
            likeliest = [k for k in likeliest if not os.path.samefile(names[k], path)]
        for k in likeliest[:5]:
            print(f"  {scores[row[path], k]:.3f}  {names[k]}")
    bad = sum(path in reasons for path in files)
    if bad:
        raise InputError(f"{bad} of {len(files):,} files could not be used")

# -------------------- 13. Arguments and main --------------------
# Defaults that depend on the data set, or on data set and task.
RECIPES = {
    # Ours: about a fifth more steps than UCF51's, and windows of three quarters of a clip.
    "audioset": {"task": "audio_tagging", "epochs": 60, "seconds": 7.5},
    "activitynet": {"batch_size": 64, "csc_offset": 0.2},   # authors
    "demo": {"task": "video_retrieval", "method": "student,xmkd", "teacher": "scratch",
             "teacher_epochs": 14, "frames": 1, "fps": 1.0, "size": 40, "frame_side": 48,
             "crop_area": 0.5, "flip": False, "seconds": 1.0, "width": 8, "lr": 1e-3,
             "weight_decay": 1e-5, "eval_every": 50},
    "demo audio_tagging": {"teacher_epochs": 60, "seconds": 0.5},
}

class Parser(argparse.ArgumentParser):
    """Reports a wrong command line like all bad input, in one line."""
    def error(self, message: str):
        raise InputError(f"{message}; see python xmkd.py --help")

def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """Returns an argparse type: a number from low to high."""
    def parse(text: str) -> float:
        with suppress(ValueError):
            value = kind(text)
            if low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text} is not a number from {low:g} to {high:g}")
    return parse

def build_parser() -> Parser:
    """Builds the command line. Its help tells which defaults are the authors' and which ours."""
    count, side, part = number(int, 1, 10**6), number(int, 16, 4096), number(float, 0, 1)
    flag = argparse.BooleanOptionalAction
    cuda = torch.cuda.is_available()
    cores = os.cpu_count() or 2
    parser = Parser(prog="xmkd.py", allow_abbrev=False,
                    description="Robust cross-modal knowledge distillation (arXiv 2304.07775).",
                    epilog="Exit codes: 0 done, 2 bad input, 130 interrupted.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    add = parser.add_argument_group("task and data").add_argument
    add("--task", default="action_recognition", choices=list(STUDENT_KIND),
        help="what the student learns; AudioSet implies audio_tagging, the demo video_retrieval")
    add("--data", default="demo", help="'demo', or a folder with a data set, see README")
    add("--split", default="balanced", choices=["balanced", "unbalanced", "all"],
        help="AudioSet's training list")
    add("--fold", type=int, default=1, choices=[1, 2, 3], help="UCF-101's split")
    add("--noise", type=part, default=0.3, help="demo: share of clips whose teacher is noisy")
    add("--mismatch", type=part, default=0.2, help="demo: share of training clips taught wrong")
    add("--per-class", type=count, metavar="N",
        help="train on N clips a class, drawn by --seed; all evaluation clips count")
    add("--max-skipped", type=part, default=0.2, help="largest share of unreadable clips")

    add = parser.add_argument_group("views").add_argument
    add("--frames", type=count, default=16, help="frames per window (authors)")
    add("--fps", type=number(float, 0.01, 240), default=4.0, help="frames a second (authors)")
    add("--size", type=side, default=112, help="side of a window in pixels (authors)")
    add("--frame-side", type=side, default=240, help="shorter side of cached frames (authors)")
    add("--seconds", type=number(float, 0.4, 3600), default=10.0, help="sound per window (PANNs)")
    add("--crop-area", type=number(float, 0.01, 1), default=0.25,
        help="smallest part of a frame that a training window shows (authors)")
    add("--flip", action=flag, default=True, help="mirror half of the training windows (authors)")
    add("--strong", action=flag, default=False,
        help="grey windows of full contrast, in training also inverted and turned (ours)")

    add = parser.add_argument_group("method").add_argument
    add("--method", default="xmkd",
        help=f"one of {', '.join(METHODS)}; several, joined by commas, or all, are compared")
    add("--teacher", default="auto",
        help="auto: the release's .npy, else r2plus1d_18 for video, scratch for sound; scratch; a "
             "checkpoint; a run's teacher.pt; or a folder of <clip id>.npy")
    add("--teacher-epochs", type=count, default=60, help="epochs of a teacher from scratch (ours)")
    add("--shuffle-teacher", action=flag, default=False,
        help="permute the teacher's embeddings among the training clips, as a control (ours)")
    add("--csc-offset", type=number(float, 1e-6, 10), default=0.07,
        help="added to the similarity to give CSC's temperature (authors)")
    add("--margin", type=number(float, 0, 2), default=0.2, help="of the triplet term (authors)")
    add("--sparsity", type=part, default=1e-3, help="weight of the L1 term (authors)")
    add("--width", type=number(int, 2, 1024), default=64,
        help="channels of the first stage; D is 8 times as many (authors)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, default=200,
        help="passes over the training clips; the last quarter at lr / 10 (authors)")
    add("--batch-size", type=number(int, 2, 10**6), default=32,
        help="clips per step, over all processes (authors)")
    add("--lr", type=number(float, 0, 10), default=3e-4,
        help="Adam's rate for the student; the filter's is a fifth of it (authors)")
    add("--weight-decay", type=part, default=5e-4, help="Adam's coupled L2 (authors)")
    add("--eval-every", type=count, default=5, help="epochs between evaluations (authors)")

    add = parser.add_argument_group("run").add_argument
    add("--seed", type=number(int, 0, 10**6), default=3,
        help="seed of demo, --per-class and teacher, and the first of --seeds (authors)")
    add("--seeds", type=count, default=1,
        help="number of runs; each takes the next seed for initialisation and order")
    add("--out", help="run folder, by default runs/<task>-<data>-<method>-s<seed>, then -2, ...")
    add("--cache", default="runs/cache", help="folder of decoded clips; runs may share it")
    add("--resume", action=flag, default=False, help="continue after the last epoch in --out")
    add("--checkpoint", metavar="FILE", help="checkpoint to evaluate: ours, the authors' or PANNs'")
    add("--predict", nargs="+", metavar="FILE",
        help="with --checkpoint: print the classes of media files, or of all in a folder")
    add("--gallery", metavar="FOLDER", help="with --predict: print its clips nearest to each file")
    add("--workers", type=number(int, 0, 256), default=min(8, cores // 2), help="loader processes")
    add("--device", default="cuda" if cuda else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--amp", action=flag, default="auto", help="run networks in bfloat16; auto: on a GPU")
    add("--compile", action=flag, default=False, help="compile the student with torch.compile")
    add("--quiet", action=flag, default=False, help="print warnings, errors and the table only")
    return parser

def parse_options(argv: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """Returns the options and the content of --checkpoint."""
    parser = build_parser()         # the command line beats the checkpoint, that beats the recipe
    args = parser.parse_args(argv)
    saved = load_checkpoint(args.checkpoint) if args.checkpoint else {"settings": {}}
    kept = {name: value for name, value in saved["settings"].items()
            if name in vars(args) and name != "amp"}
    parser.set_defaults(**kept)                             # among them --data
    args = parser.parse_args(argv)
    if not args.predict:
        layout = find_layout(args.data)
        for name in layout, f"{layout} {args.task}":
            parser.set_defaults(**{**RECIPES.get(name, {}), **kept})
        args = parser.parse_args(argv)
    if args.method == "all":
        args.method = ",".join(METHODS)
    return args, saved

def set_up_device(device: str) -> str:
    """Returns the device to use and, under torchrun, joins the processes, each with its own GPU."""
    launched = "RANK" in os.environ or "WORLD_SIZE" in os.environ
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: choose cpu, cuda or one GPU, such as cuda:1")
    try:
        if launched and not dist.is_initialized():
            dist.init_process_group(timeout=timedelta(days=1))      # decoding may take hours
        if launched and device.startswith("cuda"):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        if torch.zeros(1, device=device).is_cuda:
            torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True       # tries kernels, keeps the fastest
        if "OMP_NUM_THREADS" not in os.environ:     # half of the cores are left to the loader
            torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
        return device
    except (AssertionError, KeyError, RuntimeError, ValueError) as error:
        cause = "RANK or WORLD_SIZE in the environment" if launched else f"--device {device}"
        reason = str(error).partition("\n")[0]              # CUDA adds hints for programmers
        raise InputError(f"{cause} cannot be used: {reason}") from error

def check_options(args, saved: dict) -> None:
    """Raises InputError if options contradict each other or name what is not there."""
    methods, world = args.method.split(","), process()[1]
    unknown = [name for name in methods if name not in METHODS or methods.count(name) > 1]
    kind = saved["network"]["kind"] if args.checkpoint else STUDENT_KIND[args.task]
    is_teacher = args.teacher in ("auto", "scratch") or os.path.exists(args.teacher)
    problems = [
        (unknown, f"--method {args.method}: choose from {', '.join(METHODS)}, each once, or all"),
        (args.predict and not args.checkpoint, "--predict needs --checkpoint"),
        (args.gallery and not args.predict, "--gallery needs --predict"),
        (args.predict and world > 1, "--predict is for one process; start it without torchrun"),
        (os.path.isfile(args.out or ""), f"--out {args.out} is a file; give a folder"),
        (not args.predict and kind != STUDENT_KIND[args.task],
         f"--checkpoint {args.checkpoint} takes {kind}; give another --task than {args.task}"),
        (not is_teacher and not args.checkpoint,
         f"--teacher {args.teacher} is not auto, scratch, a file or a folder"),
        (args.amp and not args.device.startswith("cuda"),
         f"--amp needs a GPU, but --device is {args.device}; add --no-amp"),
        (args.batch_size % world,
         f"--batch-size {args.batch_size} must be a multiple of the {world} processes")]
    for is_wrong, message in problems:
        if is_wrong:
            raise InputError(message)

def choose_folder(args) -> str:
    """Makes a run folder, or finds the one that --resume continues; returns its path.

    A folder that holds a run is refused if --out asks for it; else the name ends in -2, -3, ...
    """
    what = "eval" if args.checkpoint else args.method.replace(",", "-")
    fold = f"-f{args.fold}" if args.fold > 1 else ""
    data = Path(args.data).resolve().name
    name = f"runs/{args.task}-{data}-{what}-s{args.seed}{fold}"
    folders = [Path(args.out or name)]
    while not args.out and folders[-1].exists():
        folders.append(Path(f"{name}-{len(folders) + 1}"))
    signs = ("config.json", "results.json", "teacher.pt", "*/config.json")
    runs = [folder for folder in folders if any(list(folder.glob(sign)) for sign in signs)]
    resumes = args.resume and not args.checkpoint and runs
    folder = runs[-1] if resumes else folders[-1]
    several = "," in args.method or args.seeds > 1
    other = "config.json" if several else "*-s[0-9]*/config.json"   # a single run's, a comparison's
    evaluated = (folder / "results.json").exists() and not any(folder.rglob("config.json"))
    if folder in runs and (any(folder.glob(other)) or evaluated or not resumes):
        raise InputError(f"{folder} holds a run; --resume continues it, as the single run or the "
                         "comparison that it is; else give another --out")
    join_shares([])                                 # all processes have looked, or refused it
    # Of two runs that start at once, one gets a new folder.
    folder.mkdir(parents=True, exist_ok=bool(args.out or resumes or process()[1] > 1))
    last = sorted(folder.rglob("last.pt"), key=os.path.getmtime) if resumes else []
    if last:
        saved = load_checkpoint(last[-1])
        epochs = args.teacher_epochs if saved["method"] == "teacher" else args.epochs
        log.info(f"continuing after epoch {saved['epoch']} of {epochs} in {last[-1].parent}")
    elif args.resume:
        log.warning(f"nothing to resume in {folder}; starting")
    elif len(folders) > 1:
        log.warning(f"this run goes to {folder}; others are kept")
    return str(folder)

def make_views(args, kind: str) -> Views:
    """Returns the windows of "audio" or "video" that the options ask for."""
    return Views(kind, frames=args.frames, fps=args.fps, size=args.size, seconds=args.seconds,
                 side=args.frame_side, crop_area=args.crop_area, flip=args.flip, strong=args.strong)

def require(clips: list[Clip], kind: str, who: str, remedy: str) -> None:
    """Raises InputError, which ends in `remedy`, if no clip has the `kind` that `who` needs."""
    name, other = ("sound", "pictures") if kind == "audio" else ("pictures", "sound")
    having = [clip for clip in clips if getattr(clip, kind)]
    some = having[::math.ceil(len(having) / 20) or 1]       # twenty are opened, to be sure
    if not any(kind in streams_in(getattr(clip, kind)) for clip in some):
        raise InputError(f"{who} needs {name}, but all {len(clips):,} clips have only {other}; "
                         f"{remedy}")
    lacking = len(clips) - len(having)
    if lacking:
        log.warning(f"warning: {who} needs {name}; {lacking:,} of {len(clips):,} clips have only "
                    f"{other} and are left out")

def read_clips(args, skipped: list) -> tuple[list[Clip], list[str]]:
    """Returns the clips of --data, with files, and the classes; the demo is written if need be."""
    root, tags = Path(args.data), args.task == "audio_tagging"
    kind = STUDENT_KIND[args.task]
    if args.data == "demo":
        # The number after "demo" rises with each change of what is drawn.
        root = Path(args.cache, f"demo2-{kind}-{args.noise:g}-{args.mismatch:g}-{args.seed}")
        if process()[0] == 0 and not root.exists():
            log.info(f"writing the demo's media into {root}")
            part = Path(f"{root}.{os.getpid()}.part")       # renamed once complete
            write_demo(part, kind, tags, args.noise, args.mismatch, args.seed)
            with suppress(OSError):                         # another run may have been faster
                part.rename(root)
        join_shares([])                                     # the others wait
    log.info(f"reading the lists and file names in {root}")
    _, clips, classes = read_data(root, args.split, args.fold, skipped)
    if not tags and max(len(clip.labels) for clip in clips) > 1:
        raise InputError(f"--task {args.task} needs one label for each clip, but clips of --data "
                         f"{args.data} have several; use --task audio_tagging")
    log.info(f"data {args.data}: {len(classes)} classes\n  {coverage(clips, skipped)}")
    require(clips, kind, "the student", f"--task {args.task} needs other data")
    lone = lone_labels(clips, classes)
    if lone:
        log.warning(f"{len(lone):,} labels in one split only, such as {', '.join(lone[:4])}")
    if args.per_class:
        clips = limit_classes(clips, args.per_class, args.seed)
    return clips, classes

def limit_classes(clips: list[Clip], per_class: int, seed: int) -> list[Clip]:
    """Keeps all evaluation clips, and random training clips until each class has `per_class`."""
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = {i for i in order if clips[i].split == "eval"}
    counts = Counter()
    for i in order:
        labels = clips[i].labels
        if i not in kept and min(counts[label] for label in labels) < per_class:
            counts.update(labels)
            kept.add(i)
    return [clips[i] for i in sorted(kept)]

def open_data(args, clips: list[Clip], classes: list[str], skipped: list,
              *others: Views) -> list[Data]:
    """Decodes a data set; returns a Data with the student's views and one for each of `others`."""
    least = 2 * process()[1]                                # training clips
    if args.checkpoint and args.task != "video_retrieval":
        least = 0
        clips = [clip for clip in clips if clip.split == "eval"]
    views = [make_views(args, STUDENT_KIND[args.task]), *others]
    log.info(f"decoding {len(clips):,} clips into {args.cache}, unless they are there")
    decoded = decode_all(clips, views, Path(args.cache), args.workers)
    refused = [(clip.id, reason) for clip, (_, reason) in zip(clips, decoded) if reason]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("id or path", "reason"), *skipped, *refused])
    save_once(Path(args.out, "skipped.csv"), table.getvalue())

    usable = [clip for clip, (_, reason) in zip(clips, decoded) if not reason]
    train = [i for i, clip in enumerate(usable) if clip.split == "train"]
    evaluation = [i for i, clip in enumerate(usable) if clip.split == "eval"]
    log.info(f"{len(train):,} training and {len(evaluation):,} evaluation clips can be used; "
             f"{len(skipped) + len(refused):,} entries in skipped.csv")
    unreadable = [reason for _, reason in refused if not reason.startswith("missing: ")]
    if len(unreadable) > args.max_skipped * len(clips):
        raise InputError(f"{len(unreadable)} of {len(clips)} clips are unreadable, more than "
                         f"--max-skipped {args.max_skipped:g} allows; the first: {unreadable[0]}")
    if len(train) < least or not evaluation:
        raise InputError(f"{args.data}: needs {least} training clips and one evaluation clip that "
                         f"can be used, but has {len(train)} and {len(evaluation)}")
    tags, parts = args.task == "audio_tagging", []
    for k, view in enumerate(views):
        files = [found[k] for found, reason in decoded if not reason]
        parts.append(Data(usable, classes, tags, train, evaluation, view, files))
    return parts

def estimate(plan: list[tuple], batch_size: int, width: int, machine: Machine) -> None:
    """Times a step of each network in `plan` (name, data, epochs); logs how long all takes."""
    log.info("timing a training step")
    world, told, total = process()[1], [], 0.0
    for name, data, epochs in plan:
        student, _, optimizer = build(data, "student", 0, device=machine.device, width=width)
        prepare_views, count = Prepare().to(machine.device), batch_size // world
        _, windows, _, labels, _ = next(iter(data.loader(data.train, "train", count, 0)))
        for size in 4, count, count:                        # a GPU's first steps are slow
            begun = time.time()
            inputs = prepare_views(windows[:size].to(machine.device))
            terms = train_step(student, None, optimizer, inputs, None,
                               labels[:size].to(machine.device), amp=machine.amp)
            terms["cls"].item()                             # waits for the GPU
            seconds = max(join_shares([time.time() - begun]))   # all go on or stop alike
            if seconds > 2:                                 # slow: four clips have to tell
                break
        each = seconds / len(inputs) / world                # a clip's share
        told.append(f"{duration(each * batch_size)} ({name})")
        total += each * epochs * len(data.train)
    log.info(f"a step of {batch_size} clips takes {' and '.join(told)}; training about "
             f"{duration(total)} in all")
    if total > 3 * 3600:
        log.info("smaller: --width 16 --seconds 5 --frames 8 --size 64, fewer --epochs")

# Options that may change on --resume and are not restored from --checkpoint.
MAY_CHANGE = ("method", "seeds", "out", "cache", "resume", "checkpoint", "predict", "gallery",
              "workers", "device", "machine", "compile", "quiet", "max_skipped")

def settings_of(options: dict) -> dict:
    """Returns the options that shape a result, with size and time of the teacher's file."""
    settings = {name: value for name, value in options.items() if name not in MAY_CHANGE}
    if os.path.isfile(options["teacher"]):
        status = os.stat(options["teacher"])
        settings["teacher_file"] = [status.st_size, status.st_mtime_ns]
    return settings

def fit_options(args) -> dict:
    """Returns the options of `fit` that the teacher and all students of a run share."""
    return {"machine": args.machine, "batch_size": args.batch_size, "lr": args.lr,
            "weight_decay": args.weight_decay, "width": args.width, "offset": args.csc_offset,
            "margin": args.margin, "sparsity": args.sparsity, "compiled": args.compile,
            "resume": args.resume, "settings": settings_of(vars(args))}

def prepare(args) -> tuple[Data, Tensor | None, dict | None]:
    """Reads and decodes the data set, and embeds its clips unless the only method is `student`.

    Returns the data, embeddings (N, teacher_dim), zeros where a clip has none, and who made them.
    """
    skipped, rows, network, views = [], None, None, []
    clips, classes = read_clips(args, skipped)
    if args.method != "student":
        rows, about = given_teacher(args, clips)
    if rows is not None:
        clips = leave_out(clips, rows, skipped)
    elif args.method != "student":
        wanted = make_views(args, TEACHER_KIND[args.task])
        require([clip for clip in clips if clip.split == "train"], wanted.kind, "the teacher",
                "give embeddings with --teacher FOLDER, or train without: --method student")
        network, *views = open_teacher(args.teacher, wanted, args.device)

    # `seen` holds the teacher's Data, or nothing if embeddings are given or not needed.
    data, *seen = open_data(args, clips, classes, skipped, *views)
    plan = [("student", data, args.epochs * args.seeds * len(args.method.split(",")))]
    if seen and network is None:
        plan.insert(0, ("teacher", *seen, args.teacher_epochs))
    estimate(plan, args.batch_size, args.width, args.machine)
    if args.method == "student":
        return data, None, None

    out, options = Path(args.out), fit_options(args)
    if seen and network is None:
        about["kind"] = "trained from scratch"
        network, about["metrics"] = train_teacher(*seen, out / "teacher", args.seed,
                                                  args.teacher_epochs, **options)
    if seen:
        rows = embed_clips(network, *seen, args.machine)
    none = torch.zeros_like(next(iter(rows.values())))
    embeddings = torch.stack([rows.get(clip.id, none) for clip in data.clips])
    about["metrics"] = about["metrics"] or score_probe(data, embeddings)
    if not (out / "teacher.pt").exists():
        save_once(out / "teacher.pt", {"ids": [clip.id for clip in data.clips], **about,
                                       "embeddings": embeddings, "settings": options["settings"]})
    return data, embeddings, about

def print_table(rows: dict[str, list[dict]]) -> None:
    """Prints the mean of the main metrics by method and, over several seeds, their deviation."""
    table, alone = dict(rows), rows.get("student", [])
    for method, runs in rows.items():
        if len(alone) > 1 and method not in ("student", "teacher"):
            table[f"{method} - student"] = [        # gains, paired by seed, with standard errors
                {name: run[name] - base[name] for name in base} for run, base in zip(runs, alone)]
    found = list(rows.values())[-1][0]                  # results.json has those not shown, too
    names = [name for name in ("R@1", "mAP", "top1", "top5", "AUC", "d_prime") if name in found]
    print("\n" + " " * 18 + "".join(f"{name:>16}" for name in names))
    for label, runs in table.items():
        line = f"{label:18}"
        for name in names:
            values = [run[name] for run in runs if name in run]
            cell = f"{statistics.mean(values):.3f}" if values else ""
            if len(values) > 1:
                pairs = len(values) if " - " in label else 1
                cell += f" ± {statistics.stdev(values) / math.sqrt(pairs):.3f}"
            line += f"{cell:>16}"
        print(line)

def run(args) -> None:
    """Trains every method with every seed on the same data and teacher, and prints the table."""
    begun, out, methods = time.time(), Path(args.out), args.method.split(",")
    data, embeddings, maker = prepare(args)
    about = {"task": args.task, "data": args.data, "teacher": maker,
             "clips": {"train": len(data.train), "eval": len(data.eval)}}
    rows = {} if maker is None else {"teacher": [maker["metrics"]]}
    if maker is not None and args.shuffle_teacher:
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(args.seed))
        embeddings[data.train] = embeddings[data.train][order]
    several = len(methods) > 1 or args.seeds > 1
    retrieval = args.task == "video_retrieval"
    for seed in range(args.seed, args.seed + args.seeds):
        for method in methods:
            started = time.time()
            folder = out / f"{method}-s{seed}" if several else out
            log.info(f"training {method} with seed {seed} for {args.epochs} epochs")
            student = fit(data, method, embeddings, folder, seed, epochs=args.epochs,
                          eval_every=args.eval_every, **fit_options(args))
            metrics, by_class = evaluate(student, data, args.machine, retrieval)
            best, metrics_best = load_checkpoint(folder / "best.pt"), metrics
            if best["epoch"] < args.epochs:
                student.load_state_dict(best["student"])
                metrics_best, _ = evaluate(student, data, args.machine, retrieval)
            save_once(folder / "results.json", {
                **about, "method": method, "seed": seed, "seconds": round(time.time() - started, 1),
                "metrics": metrics, "epoch": best["epoch"], "metrics_best": metrics_best,
                "by_class": by_class})
            rows.setdefault(method, []).append(metrics)
    if several:
        means = {}
        for method in methods:
            runs = rows[method]
            means[method] = {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
        save_once(out / "results.json", {
            **about, "method": args.method, "seed": args.seed, "metrics": means, "table": rows,
            "seconds": round(time.time() - begun, 1)})
    print_table(rows)
    log.info("\nThe table shows the last epoch; each run's results.json also has the best one.")

def evaluate_checkpoint(args, saved: dict) -> None:
    """Evaluates --checkpoint on a data set. Raises InputError if its classes differ."""
    begun, skipped, count = time.time(), [], saved["network"]["num_classes"]
    clips, classes = read_clips(args, skipped)
    known = saved["classes"] or classes             # the authors and PANNs do not name theirs
    if known != classes or count != len(classes):
        differ = [pair for pair in zip(known, classes) if pair[0] != pair[1]]
        one, other = (differ or [(known[-1], classes[-1])])[0]
        raise InputError(f"--checkpoint {args.checkpoint} has {count} classes, such as {one}; "
                         f"--data {args.data} has {len(classes)}, such as {other}; give the data "
                         "set that it was trained on")
    [data] = open_data(args, clips, classes, skipped)
    metrics, by_class = evaluate(restore(saved, args.device), data, args.machine,
                                 args.task == "video_retrieval")
    save_once(Path(args.out, "results.json"), {
        "task": args.task, "data": args.data, "teacher": None, "method": saved["method"],
        "seed": saved["seed"], "checkpoint": args.checkpoint, "metrics": metrics,
        "by_class": by_class, "clips": {"train": len(data.train), "eval": len(data.eval)},
        "seconds": round(time.time() - begun, 1)})
    print_table({saved["method"]: [metrics]})

def keep_memory() -> None:
    """Lets glibc keep freed memory for the next tensors: a training step is 1.5 times as fast."""
    with suppress(AttributeError, OSError):         # another C library has no mallopt
        ctypes.CDLL(None).mallopt(-4, 0)            # M_MMAP_MAX: large blocks are in the heap, too
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)    # M_TRIM_THRESHOLD: the heap stays as it is

def explain(error: Exception) -> str:
    """Returns an error as one line with its remedy, or "" if it is a fault of this program."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = lines[-1].rstrip(".").rpartition("InputError: ")[2]    # a loader process adds more
    shared = r"DataLoader worker|shared memory|28\] No space left on device"
    full = r"MemoryError|allocate memory|Unable to allocate|out of memory"
    in_a_file = isinstance(error, InputError) or getattr(error, "filename", None)
    if re.search(shared, reason) and not in_a_file:
        reason += "; memory or /dev/shm may be full: give more, or --workers 0, which needs less"
    elif re.search(full, reason):
        reason += "; the memory is full: lower --workers, --batch-size or --frames"
    elif isinstance(error, RuntimeError):
        return ""
    return f"error: {reason}"

def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 2 bad input, 130 interrupted."""
    for stream in sys.stdout, sys.stderr:
        with suppress(AttributeError):              # a notebook's has no such method
            stream.reconfigure(errors="backslashreplace")   # for names it cannot show
    try:
        args, saved = parse_options(argv)
        args.device = set_up_device(args.device)
        if args.amp == "auto":      # on CPUs, VideoNet's bfloat16 gradients are inaccurate
            args.amp = args.device.startswith("cuda")
        args.machine = Machine(args.device, args.amp, args.workers)
        check_options(args, saved)
        if process()[0] > 0:                        # process 0 speaks for all
            sys.stdout = open(os.devnull, "w")
        logging.basicConfig(format="%(message)s", stream=sys.stdout, force=True)
        log.setLevel(logging.WARNING if args.quiet else logging.INFO)
        keep_memory()
        if args.predict:
            views = make_views(args, saved["network"]["kind"])
            predict_files(saved, args.predict, args.gallery, views, Path(args.cache), args.machine)
        else:
            args.out = choose_folder(args)
            try:
                if args.checkpoint:
                    evaluate_checkpoint(args, saved)
                else:
                    run(args)
            finally:
                with suppress(OSError):
                    os.rmdir(args.out)              # if nothing was written
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except (InputError, OSError, RuntimeError, MemoryError) as error:
        code, message = 2, explain(error)
        if not message:
            raise
    except KeyboardInterrupt:
        code, message = 130, "\ninterrupted; --resume continues a training run"
    print(message, file=sys.stderr)
    return code

if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)   # ends quietly, as all programs do, in `| head`
    sys.exit(main())
