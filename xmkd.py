# SPDX-License-Identifier: MIT
"""Robust Cross-Modal Knowledge Distillation for Unconstrained Videos, in one file.

Paper: Xia, Li, Deng, Xiong, Dou, Hu, 2023, https://arxiv.org/abs/2304.07775

Vision and sound of one clip are often taken to mean the same. In unconstrained videos they do not: a modality carries
irrelevant noise, and pairs of clips correlate to different degrees. The Modality Noise Filter (MNF) cleans the teacher
modality with cross-modal context; Contrastive Semantic Calibration (CSC) distils it into a student of one modality.

    python xmkd.py                                              # demo: student alone against the distilled student
    python xmkd.py --task audio_tagging --data ./audioset       # the real thing; also ucf101, or train/<label>/* folders

The algorithm, numbered as in `train_step`; the teacher is frozen, one embedding a clip:
    1. student   map S, pooled p, logits       = student(view)
    2. filter    gate g = sigmoid(W [t ; S]),  purified teacher t^ = g * t
                 evidence s^ = attention(query t^, keys and values S),  y^ = classifier(s^)
    3. trust     similarity_ij = cos(p_i, t^_j), a constant
    4. L_filter  = CE(y^, y) + sparsity(W) + triplet(p, t, t^)                   trains the filter only
    5. L_student = CE(logits, y) + CSC(p, s^, temperature = similarity + offset)  trains student and filter
    6. Adam: student at lr, filter at 0.2 lr

Sections: 1 Method, 2 Networks, 3 Media, 4 Data sets, 5 Demo data, 6 Clip store and views, 7 Metrics, 8 Training,
9 Teacher, 10 Run support, 11 Arguments and main.
Letters: B clips in a batch, K positions of a map, D features, C classes, T frames, N clips.
"""
from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from av.video.reformatter import VideoReformatter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.models.video import R2Plus1D_18_Weights, r2plus1d_18
from torchvision.transforms import v2

__version__ = "0.1.0"


class InputError(ValueError):
    """Input that its owner can mend: a file, a list, an option. `main` prints it as one line and exits with 2."""


# ============================================== 1. Method (step numbers are the title page's)
def cosine_matrix(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every pair of rows: (N, D), (M, D) -> (N, M) in [-1, 1]; a row of zeros gives 0."""
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def label_overlap(labels: Tensor) -> Tensor:
    """How much two clips count as positives of each other: (B, B) in [0, 1], diagonal 1.

    labels  (B,) class indices: 1 where equal (authors' code), or
            (B, C) multi-hot tags: Jaccard index |y_i and y_j| / |y_i or y_j| (ours; two clips without tags give 1).
    """
    if labels.ndim == 1:
        return (labels[:, None] == labels[None, :]).float()
    tags = labels.float()
    shared = tags @ tags.T                                                    # (B, B) tags in common
    union = tags.sum(1)[:, None] + tags.sum(1)[None, :] - shared
    return torch.where(union > 0, shared / union.clamp_min(1), 1.0)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy for class indices (B,), mean binary cross-entropy for multi-hot tags (B, C). logits (B, C); nats."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def csc_loss(student: Tensor, evidence: Tensor, similarity: Tensor, labels: Tensor, offset: float = 0.07) -> Tensor:
    """Contrastive Semantic Calibration: a contrastive loss with one temperature per pair. Authors' loss/csc_loss.py.

    student     (B, D)  pooled student embedding p, any scale (normalised here)
    evidence    (B, D)  student evidence s^ that the purified teacher points at, any scale
    similarity  (B, B)  cosine in [-1, 1], row = student, column = purified teacher; detached. Zeros: no calibration
    labels      (B,) class indices or (B, C) multi-hot tags, see `label_overlap`
    offset      added to the similarity to make the temperature; 0.07 UCF51, 0.2 ActivityNet
    returns     ()      batch mean in nats; log(B) when all embeddings and all similarities are equal
    Raises ValueError if `similarity` carries a gradient or `offset` is not positive.
    Agreeing pairs are softened, others sharpened. The 1e-10 caps each term near 23 nats.
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
    """Mean over output rows of the L1 norm of a weight matrix (out, in) -> (). Authors' train.py, `norm_loss`."""
    return weight.abs().sum(1).mean()


def triplet_loss(student: Tensor, teacher: Tensor, purified: Tensor, margin: float = 0.2) -> Tensor:
    """The purified teacher must lie closer to the student than the raw one, by `margin` in cosine. All (B, D) -> ()."""
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
    """MNF: gates the teacher by what the student sees, then asks the student's map with it. Authors' models/modality_noise_filter.py.

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


def train_step(student: nn.Module, noise_filter: ModalityNoiseFilter | None, optimizer: torch.optim.Optimizer,
               inputs: Tensor, teacher: Tensor | None, labels: Tensor, offset: float = 0.07, margin: float = 0.2,
               sparsity: float = 1e-3, method: str = "xmkd") -> dict[str, Tensor]:
    """One whole update; returns the detached loss terms as weighted in the sum. Numbers are the title page's.

    inputs (B, ...) for the student, teacher (B, D) embeddings, labels (B,) or (B, C); any float dtype.
    method  "xmkd"; "mnf": constant temperature; "csc": contrast with the unfiltered teacher; "student": no distillation.
    """
    student.train()
    features = student(inputs)                                                                        # 1. student
    student_terms = {"cls": classification_loss(features.logits, labels)}
    filter_terms = {}
    if noise_filter is not None and teacher is not None and method != "student":
        noise_filter.train()
        raw = noise_filter.adapter(teacher)                                                           # (B, D)
        if method == "csc":
            purified, evidence = raw, raw
        else:
            purified, evidence, filter_logits, _, _ = noise_filter(teacher, features.map)             # 2. filter
            weight = noise_filter.gated_feature_composer[3].weight        # only the last layer: as the released loop does
            filter_terms = {"filter_cls": classification_loss(filter_logits, labels),                 # 4. filter loss
                            "sparsity": sparsity * sparsity_loss(weight),
                            "triplet": triplet_loss(features.pooled, raw.detach(), purified, margin)}
        similarity = cosine_matrix(features.pooled, purified).detach()                                # 3. trust (B, B)
        if method == "mnf":
            similarity = torch.zeros_like(similarity)
        student_terms["csc"] = csc_loss(features.pooled, evidence, similarity, labels, offset)        # 5. student loss
    optimizer.zero_grad(set_to_none=True)
    if filter_terms:  # trains the filter only: a backward limited to its parameters equals a full one, thrown away in the student
        torch.stack(list(filter_terms.values())).sum().backward(inputs=list(noise_filter.parameters()), retain_graph=True)
    torch.stack(list(student_terms.values())).sum().backward()
    optimizer.step()                                                                                  # 6. Adam
    return {name: value.detach() for name, value in {**student_terms, **filter_terms}.items()}


def make_optimizer(student: nn.Module, noise_filter: nn.Module | None, lr: float = 3e-4, weight_decay: float = 5e-4,
                   filter_lr: float = 0.2) -> torch.optim.Adam:
    """Adam with coupled weight decay; the filter learns at `filter_lr` times the student's rate (authors' settings)."""
    groups: list[dict[str, Any]] = [{"params": list(student.parameters()), "lr": lr}]
    if noise_filter is not None:
        groups.append({"params": list(noise_filter.parameters()), "lr": filter_lr * lr})
    return torch.optim.Adam(groups, weight_decay=weight_decay)


# ============================================== 2. Networks (attribute names are those of the released checkpoints)
class Features(NamedTuple):
    """What a student returns."""
    map: Tensor     # (B, K, D) one feature per position: t, h, w (video) or t, mel (audio), the last one fastest
    pooled: Tensor  # (B, D) the clip's embedding, non-negative
    logits: Tensor  # (B, C)


class FactorisedConv3d(nn.Module):
    """A k_t x k_h x k_w convolution as spatial conv, BN, ReLU, temporal conv, with about as many weights. No biases."""

    def __init__(self, c_in: int, c_out: int, kernel: Sequence[int], stride: Sequence[int] = (1, 1, 1)) -> None:
        super().__init__()
        (kt, kh, kw), (st, sh, sw) = kernel, stride
        middle = (kt * kh * kw * c_in * c_out) // (kh * kw * c_in + kt * c_out)
        self.spatial_conv = nn.Conv3d(c_in, middle, (1, kh, kw), (1, sh, sw), (0, kh // 2, kw // 2), bias=False)
        self.bn = nn.BatchNorm3d(middle)
        self.temporal_conv = nn.Conv3d(middle, c_out, (kt, 1, 1), (st, 1, 1), (kt // 2, 0, 0), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, T, H, W) -> (B, c_out, T', H', W')."""
        return self.temporal_conv(F.relu(self.bn(self.spatial_conv(x))))


class VideoBlock(nn.Module):
    """Residual block of two factorised 3x3x3 convolutions; `downsample` halves all three axes, its shortcut factorised too."""

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
        """(B, c_in, T, H, W) -> (B, c_out, T', H', W')."""
        shortcut = self.downsamplebn(self.downsampleconv(x)) if self.downsample else x
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(shortcut + self.bn2(self.conv2(x)))


class VideoStage(nn.Module):
    """`count` residual blocks; the first may downsample."""

    def __init__(self, c_in: int, c_out: int, count: int, downsample: bool) -> None:
        super().__init__()
        self.block1 = VideoBlock(c_in, c_out, downsample)
        self.blocks = nn.ModuleList(VideoBlock(c_out, c_out) for _ in range(count - 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, T, H, W) -> (B, c_out, T', H', W')."""
        x = self.block1(x)
        for block in self.blocks:
            x = block(x)
        return x


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
        self.conv2 = VideoStage(width, width, blocks[0], downsample=False)
        self.conv3 = VideoStage(width, 2 * width, blocks[1], downsample=True)
        self.conv4 = VideoStage(2 * width, 4 * width, blocks[2], downsample=True)
        self.conv5 = VideoStage(4 * width, 8 * width, blocks[3], downsample=True)
        self.cls = nn.Linear(8 * width, num_classes)

    def forward(self, frames: Tensor) -> Features:
        """frames (B, 3, T, H, W), ImageNet-normalised -> Features; 16x112x112 gives K = 2*7*7 = 98 positions."""
        x = F.relu(self.bn1(self.conv1(frames)))
        x = self.conv5(self.conv4(self.conv3(self.conv2(x))))              # (B, D, T/8, H/16, W/16)
        features = x.flatten(2).transpose(1, 2)                            # (B, K, D)
        pooled = features.mean(1)
        return Features(features, pooled, self.cls(pooled))


class LogMel(nn.Module):
    """PANNs' front end: waveform (B, samples) at 32 kHz, -1..1 -> (B, 1 + samples // 320, 64) decibels, always float32.

    Periodic Hann window of 1024, hop 320, power spectrum, 64 Slaney mel bins 50-14000 Hz, 10 log10(max(x, 1e-10)).
    """

    def __init__(self) -> None:
        super().__init__()
        self.mel = torchaudio.transforms.MelSpectrogram(32000, n_fft=1024, hop_length=320, f_min=50, f_max=14000, n_mels=64,
                                                        norm="slaney", mel_scale="slaney")
        self.decibel = torchaudio.transforms.AmplitudeToDB("power")

    def forward(self, samples: Tensor) -> Tensor:
        """(B, samples) -> (B, T, 64)."""
        with torch.autocast(samples.device.type, enabled=False):      # half precision overflows here (PANNs issue 17)
            return self.decibel(self.mel(samples.float())).transpose(1, 2)


class AudioBlock(nn.Module):
    """Two 3x3 conv + BN + ReLU, then average pooling over `pool` x `pool`."""

    def __init__(self, c_in: int, c_out: int, pool: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.pool = nn.BatchNorm2d(c_out), nn.BatchNorm2d(c_out), pool

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, T, mel) -> (B, c_out, T // pool, mel // pool)."""
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


def make_network(modality: str, num_classes: int, width: int) -> nn.Module:
    """The student, or a teacher from scratch, of one modality; D = 8 * width for both."""
    return VideoNet(num_classes, width=width) if modality == "video" else AudioNet(num_classes, width, dim=8 * width)


class Prepare(nn.Module):
    """Raw views -> network input in float32, on the views' device.

    (B, T, 3, H, W) uint8 frames -> (B, 3, T, H, W) with ImageNet's mean and std (authors).
    (B, samples) int16 -> (B, T, 64) decibels. In train mode SpecAugment masks 2 time and 2 mel stripes of at most PANNs'
    widths (64 of 1001 frames, 8 of 64 bins) with the batch mean.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logmel = LogMel()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1))

    def forward(self, views: Tensor) -> Tensor:
        """uint8 (B, T, 3, H, W) -> (B, 3, T, H, W), or int16 (B, samples) -> (B, T, 64)."""
        if views.ndim == 5:
            return (views.transpose(1, 2).float() / 255 - self.mean) / self.std
        logmel = self.logmel(views.float() / 32767)
        if not self.training:
            return logmel
        mean = logmel.mean()
        logmel = logmel - mean
        for axis, width in ((1, max(2, logmel.shape[1] * 64 // 1001)), (2, 8)) * 2:
            logmel = torchaudio.functional.mask_along_axis_iid(logmel, width, 0.0, axis)
        return logmel + mean


# ============================================== 3. Media (PyAV; opened and closed per call, one thread)
@contextmanager
def open_media(path: str | os.PathLike[str]) -> Iterator[Any]:
    """PyAV container of a local regular file, `.gz` included; what FFmpeg refuses becomes an InputError naming the file."""
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise InputError(f"{name}: not a regular file" if os.path.exists(name) else f"{name}: no such file")
    if os.path.getsize(name) == 0:
        raise InputError(f"{name}: empty file (0 bytes)")
    av.logging.set_level(None)                                                  # FFmpeg's own messages name no file
    try:
        with gzip.open(name) if name.endswith(".gz") else open(name, "rb") as file:
            with av.open(file, metadata_errors="replace") as container:
                yield container
    except (av.error.FFmpegError, OSError, EOFError) as error:
        raise InputError(f"{name}: cannot be decoded ({getattr(error, 'strerror', None) or error})") from error


def open_stream(path: str | os.PathLike[str], container: Any, kind: str) -> Any:
    """The stream of `kind` ("audio", "video") that FFmpeg deems best, on one thread; a cover picture is no video."""
    stream = container.streams.best(kind)
    if stream is None or (kind == "video" and stream.disposition & av.stream.Disposition.attached_pic):
        raise InputError(f"{os.fspath(path)}: no {kind} stream")
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1
    return stream


def timed_frames(container: Any, stream: Any, start: float, end: float | None) -> Iterator[tuple[float, Any]]:
    """(seconds since the container's start, frame) from just before `start` up to `end`; damaged packets are dropped."""
    origin = (container.start_time or 0) / av.time_base
    if start > 0:
        try:
            container.seek(int((max(start - 0.5, 0.0) + origin) * av.time_base))
        except av.error.FFmpegError:
            pass                                                                # no index: decode from the beginning
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            continue
        for frame in frames:
            seconds = float(frame.time or 0.0) - origin
            if end is not None and seconds >= end:
                return
            yield seconds, frame


def check_length(path: str | os.PathLike[str], container: Any, stream: Any, start: float, end: float | None, got: float) -> None:
    """Raises InputError where a header promises over 10 % (at least 0.3 s) more seconds than were decoded: a cut-off file."""
    if container.format.name in ("mp3", "aac"):                                 # these have no header, only a guess
        return
    total = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / av.time_base
    promised = min(total, end if end is not None else total) - start
    if got <= 0 or got < promised - max(0.3, 0.1 * promised):
        raise InputError(f"{os.fspath(path)}: truncated, {max(got, 0.0):.1f} of {promised:.1f} s of {stream.type} decoded")


def decode_audio(path: str | os.PathLike[str], start: float = 0.0, end: float | None = None, rate: int = 32000) -> Tensor:
    """Samples of the file's best audio stream between two times: (samples,) float32, mono, about -1..1.

    start, end  seconds on the file's own clock; end=None reads to its end.   rate  Hz.
    Raises InputError: unreadable, no audio stream, nothing in the range, shorter than the header promises.
    """
    pieces: list[Any] = []
    first = resampler = layout = None
    with open_media(path) as container:
        stream = open_stream(path, container, "audio")
        for seconds, frame in timed_frames(container, stream, start, end):
            first = seconds if first is None else first
            if layout != (layout := (frame.format.name, frame.layout.name, frame.sample_rate)):
                pieces += resampler.resample(None) if resampler else []         # parameters can change in mid-stream
                resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
            frame.pts = None                                                    # no gap filling: sample counts keep time
            pieces += resampler.resample(frame)
        pieces += resampler.resample(None) if resampler else []
        samples = np.concatenate([piece.to_ndarray()[0] for piece in pieces]) if pieces else np.zeros(0, np.float32)
        begin = max(round((start - (first or 0.0)) * rate), 0)
        samples = samples[begin:None if end is None else begin + round((end - start) * rate)]
        check_length(path, container, stream, start, end, len(samples) / rate)
    return torch.from_numpy(samples)


def decode_video(path: str | os.PathLike[str], start: float = 0.0, end: float | None = None, fps: float = 4.0,
                 size: tuple[int, int] = (128, 171)) -> Tensor:
    """Frames of the file's best video stream at a fixed rate: (T, 3, H, W) uint8 RGB, T = ceil(seconds * fps).

    start, end  seconds on the file's own clock; end=None reads to its end.   fps  frame k is the one shown at start + k / fps.
    size  (H, W) in pixels, whatever the file's aspect ratio (torchvision's video presets resize to the same 128 x 171).
    Raises InputError: unreadable, no video stream, nothing in the range, shorter than the header promises.
    """
    frames: list[Any] = []
    reformatter, shown, shown_image, last = VideoReformatter(), None, None, start

    def show(frame: Any) -> Any:
        turns = round((getattr(frame, "rotation", 0) or 0) / 90) % 4            # phones store the turn beside the picture
        height, width = size if turns % 2 == 0 else size[::-1]
        image = reformatter.reformat(frame, width, height, "rgb24", threads=1).to_ndarray()
        return np.rot90(image, turns).transpose(2, 0, 1)

    with open_media(path) as container:
        stream = open_stream(path, container, "video")
        period = 1 / float(stream.average_rate or 25)
        for seconds, frame in itertools.chain(timed_frames(container, stream, start, end), [(math.inf, None)]):
            stop = min(seconds, last + period if frame is None else math.inf, math.inf if end is None else end)
            while shown is not None and start + len(frames) / fps < stop - 1e-6:
                shown_image = show(shown) if shown_image is None else shown_image
                frames.append(shown_image)
            shown, shown_image, last = frame, None, seconds if frame is not None else last
        check_length(path, container, stream, start, end, last + period - start if frames else 0.0)
    return torch.from_numpy(np.stack(frames))


# ============================================== 4. Data sets
class Clip(NamedTuple):
    """One sample of a data set. Times are those of the list; `load_clip` maps them onto the file."""
    id: str
    labels: tuple[int, ...]      # indices into the class names, at least one
    split: str                   # "train" or "eval"
    audio: str | None            # path of the file that holds the sound
    video: str | None            # path of the file that holds the picture; often the same
    start: float = 0.0           # seconds
    end: float | None = None     # None: to the end of the file


def walk_media(root: str | os.PathLike[str]) -> list[str]:
    """Paths of all media files under `root` by extension, sorted; linked folders are followed, each once."""
    media = ("wav flac mp3 m4a ogg opus aac wav.gz mp4 mkv webm avi mov m4v mpg mpeg").split()
    endings, found, seen = tuple("." + e for e in media), [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [s for s in sorted(subfolders) if not s.startswith(".")]
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        found += [os.path.join(folder, f) for f in files if f.lower().endswith(endings) and not f.startswith("._")]
    return sorted(found)


def is_sound_only(path: str) -> bool:
    """True for the extensions that hold sound without picture."""
    return path.lower().endswith((".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus", ".aac", ".wav.gz"))


def read_audioset(root: str | os.PathLike[str], split: str = "balanced",
                  skipped: list[tuple[str, str]] | None = None) -> tuple[list[Clip], list[str]]:
    """AudioSet: `class_labels_indices.csv`, `*_segments.csv` and media anywhere under `root` -> clips, display names.

    split    training list: "balanced", "unbalanced" or "all"; the eval list is always read.
    skipped  if given, gets (id, reason) of every listed clip without a file.
    A file belongs to the 11-character id at the start of its name, after an optional prefix Y, v_, id_ or v; only listed ids
    count, so layouts need not be known. Sound and picture may lie in two files. Raises InputError naming file and line.
    """
    skipped = [] if skipped is None else skipped
    tables = sorted(p for p in Path(root).rglob("*.csv") if p.is_file())
    labels_file = next((p for p in tables if p.name == "class_labels_indices.csv"), None)
    if labels_file is None:
        raise InputError(f"no class_labels_indices.csv under {root}; AudioSet publishes it beside the segment lists")
    with labels_file.open(newline="", encoding="utf-8-sig") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: int(row["index"]))
    classes, index_of = [row["display_name"] for row in rows], {row["mid"]: i for i, row in enumerate(rows)}

    listed: dict[str, tuple[str, float, float, tuple[int, ...]]] = {}
    for table in tables:
        kind = next((k for k in ("unbalanced", "balanced", "eval") if k in table.name), "")
        if not table.name.endswith("_segments.csv") or kind not in ("eval", *(("balanced", "unbalanced") if split == "all" else (split,))):
            continue
        with table.open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.reader(file, skipinitialspace=True), 1):
                fields = [f for f in (field.strip(' "') for field in ",".join(row).split(",")) if f]
                if not fields or fields[0].startswith("#"):
                    continue
                try:
                    ytid, start, end, mids = fields[0], float(fields[1]), float(fields[2]), fields[3:]
                    if not (len(ytid) == 11 and 0 <= start < end < math.inf and mids):
                        raise ValueError
                except (ValueError, IndexError):
                    raise InputError(f"{table}:{number}: expected 'id, start, end, \"label,label\"' with an 11-character id and "
                                     f"0 <= start < end, got {','.join(row)!r}; correct or remove the line") from None
                unknown = [m for m in mids if m not in index_of]
                if unknown:
                    raise InputError(f"{table}:{number}: unknown label {unknown[0]!r}; {labels_file} lists {len(classes)} known ones")
                if ytid in listed:
                    skipped.append((f"{ytid} ({table.name}:{number})", "listed twice; the first row counts"))
                else:
                    listed[ytid] = ("eval" if kind == "eval" else "train", start, end, tuple(sorted({index_of[m] for m in mids})))

    sound: dict[str, str] = {}
    picture: dict[str, str] = {}
    media = walk_media(root)
    for path in media:
        name = os.path.basename(path)
        for prefix in ("", "Y", "v_", "id_", "v"):            # bare id first: ids may begin with any of the prefixes
            ytid = name[len(prefix):len(prefix) + 11]
            if name.startswith(prefix) and ytid in listed:
                (sound if is_sound_only(path) else picture).setdefault(ytid, path)   # copies in label folders: first one
                break
    clips = [Clip(ytid, labels, part, sound.get(ytid, picture.get(ytid)), picture.get(ytid), start, end)
             for ytid, (part, start, end, labels) in listed.items() if ytid in sound or ytid in picture]
    if not clips:
        raise InputError(f"none of the {len(listed):,} clips listed under {root} has a file there; ids listed: "
                         f"{', '.join(itertools.islice(listed, 3)) or 'none'}; files seen: "
                         f"{', '.join(os.path.basename(p) for p in media[:3]) or 'none'}; names must begin with the id")
    skipped += [(ytid, "missing: listed, but no file has its id") for ytid in listed if ytid not in sound and ytid not in picture]
    return clips, classes


def read_ucf101(root: str | os.PathLike[str], fold: int = 1, skipped: list[tuple[str, str]] | None = None) -> tuple[list[Clip], list[str]]:
    """UCF-101: `UCF-101/<Class>/*.avi` and `ucfTrainTestlist/` -> clips and names of the 51 classes that have sound.

    fold  1, 2 or 3.  skipped  if given, gets (path, reason) of every listed clip left out.
    Names are compared without case: UCF-101 itself writes HandstandPushups/v_HandStandPushups_*. Raises InputError.
    """
    with_sound = set("""applyeyemakeup applylipstick archery babycrawling balancebeam bandmarching basketballdunk blowdryhair
        blowingcandles bodyweightsquats bowling boxingpunchingbag boxingspeedbag brushingteeth cliffdiving cricketbowling
        cricketshot cuttinginkitchen fieldhockeypenalty floorgymnastics frisbeecatch frontcrawl haircut hammerthrow hammering
        handstandpushups handstandwalking headmassage icedancing knitting longjump moppingfloor parallelbars playingcello
        playingdaf playingdhol playingflute playingsitar rafting shavingbeard shotput skydiving soccerpenalty stillrings
        sumowrestling surfing tabletennisshot typing unevenbars wallpushups writingonboard""".split())
    skipped = [] if skipped is None else skipped
    folders = {p.name.lower(): p for p in Path(root).iterdir() if p.is_dir()}
    lists = folders["ucftraintestlist"]
    try:
        names = [line.split()[-1] for line in (lists / "classInd.txt").read_text("utf-8-sig").splitlines() if line.strip()]
        listed = [(part, line.split()[0]) for part, file in (("train", f"trainlist0{fold}.txt"), ("eval", f"testlist0{fold}.txt"))
                  for line in (lists / file).read_text("utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"{error.filename} is missing; ucfTrainTestlist needs classInd.txt, trainlist0{fold}.txt and "
                         f"testlist0{fold}.txt (--fold 1, 2 or 3)") from None
    classes = sorted((name for name in names if name.lower() in with_sound), key=str.lower)
    index_of = {name.lower(): i for i, name in enumerate(classes)}
    media = walk_media(folders.get("ucf-101", Path(root)))
    file_of = {Path(path).stem.lower(): path for path in media}
    clips = []
    for part, entry in listed:
        folder, stem = entry.split("/")[0].lower(), Path(entry).stem
        path = file_of.get(stem.lower())
        if folder not in index_of:
            skipped.append((entry, "its class has no sound" if folder in (n.lower() for n in names) else "its class is not in classInd.txt"))
        elif path is None:
            skipped.append((entry, "missing: listed, but no file has its name"))
        else:
            clips.append(Clip(Path(path).stem, (index_of[folder],), part, path, path))
    if not clips:
        raise InputError(f"none of the {len(listed):,} clips listed in {lists} has a file under {root}; listed: "
                         f"{', '.join(e for _, e in listed[:3])}; files seen: {', '.join(os.path.basename(p) for p in media[:3]) or 'none'}")
    return clips, classes


def read_folder(root: str | os.PathLike[str], skipped: list[tuple[str, str]] | None = None) -> tuple[list[Clip], list[str]]:
    """A folder of folders: `train/<label>/*` and `val/<label>/*`, one label a clip -> clips and sorted class names."""
    skipped = [] if skipped is None else skipped
    found: list[tuple[str, str, str]] = []                                       # (split, label, path)
    for part, folder in (("train", "train"), ("eval", "val")):
        for path in walk_media(Path(root) / folder):
            label, *rest = Path(path).relative_to(Path(root) / folder).parts
            if rest:
                found.append((part, label, path))
            else:
                skipped.append((path, f"lies in {folder}/ itself; expected {folder}/<label>/"))
    if not found:
        raise InputError(f"no media file under {root}/train/<label>/ or {root}/val/<label>/")
    classes = sorted({label for _, label, _ in found})
    clips = [Clip(os.path.splitext(os.path.relpath(path, root))[0], (classes.index(label),), part, path,
                  None if is_sound_only(path) else path) for part, label, path in found]
    return clips, classes


def load_clip(clip: Clip, wanted: dict[str, tuple[str, ...]], fps: float = 4.0,
              size: tuple[int, int] = (128, 171)) -> tuple[Tensor | None, Tensor | None]:
    """Decodes a clip's streams -> samples (n,) float32 at 32 kHz, frames (T, 3, H, W) uint8; None where a stream is not wanted.

    wanted  per split the streams that a clip must have; raises InputError where one is missing or unreadable.
    The file is a whole video or already cut, which its duration decides: cut where it cannot hold the listed times.
    """
    decoded: list[Tensor | None] = []
    for kind, path in (("audio", clip.audio), ("video", clip.video)):
        if kind not in wanted[clip.split]:
            decoded.append(None)
            continue
        if path is None:
            raise InputError(f"{clip.id}: no file with a {kind} stream")
        start, end = clip.start, clip.end
        if start > 0 and end is not None:
            with open_media(path) as container:
                duration = (container.duration or 0) / av.time_base
            if duration < end - 0.5 or duration <= end - start + 0.5:
                start, end = 0.0, end - start
        decoded.append(decode_audio(path, start, end) if kind == "audio" else decode_video(path, start, end, fps, size))
    return decoded[0], decoded[1]


# ============================================== 5. Demo data (synthesised from the seed; no files)
def demo_clips(tags: bool, train: int = 480, evaluation: int = 240) -> tuple[list[Clip], list[str]]:
    """Clips of ten audio-visual events, five kinds in two directions; with `tags` 40 % of the clips hold two events."""
    kinds, ways = ("disc", "ring", "square", "cross", "bar"), ("sideways, falling tone", "up and down, rising tone")
    classes = [f"{kind} {way}" for kind in kinds for way in ways]
    clips = []
    for part, count in (("train", train), ("eval", evaluation)):
        rng = np.random.default_rng([count, part == "train"])
        for i in range(count):
            labels = [i % 10] + ([int((i + rng.integers(1, 10)) % 10)] if tags and rng.random() < 0.4 else [])
            clips.append(Clip(f"{part}-{i:04d}", tuple(sorted(labels)), part, "demo", "demo", 0.0, 1.0))
    return clips, classes


def demo_truth(clip: Clip, seed: int, noise: float, mismatch: float) -> tuple[list[int], list[int]]:
    """(events in the teacher's modality, irrelevant ones mixed in): what the two dials do to this clip."""
    rng = np.random.default_rng([seed, *clip.id.encode()])
    others = [c for c in range(10) if c not in clip.labels]
    noisy, wrong, silent = rng.random(3) < (noise, mismatch if clip.split == "train" else 0.0, 0.3)
    shown = list(clip.labels) if not wrong else [] if silent else list(rng.choice(others, len(clip.labels), replace=False))
    mixed = [int(c) for c in rng.choice([c for c in others if c not in shown], rng.integers(1, 3), replace=False)] if noisy else []
    return [int(c) for c in shown], mixed


def demo_sound(events: Sequence[tuple[int, float]], snr: float, rng: np.random.Generator, rate: int = 32000) -> Tensor:
    """One second of (class, loudness) calls in pink noise at `snr` decibels: (rate,) float32. Kind: pitch; way: falling, rising."""
    spectrum = np.fft.rfft(rng.standard_normal(rate)) / np.sqrt(np.maximum(np.arange(rate // 2 + 1), 20))
    back = np.fft.irfft(spectrum, rate)
    sound = back / back.std() * 10 ** (-snr / 20)
    for event, loudness in events:
        n = int(rng.uniform(0.25, 0.5) * rate)
        at, t = int(rng.integers(0, rate - n)), np.linspace(0, 1, n)
        pitch = 260 * 1.5 ** (event // 2) * rng.uniform(0.93, 1.07)
        glide = np.cumsum(pitch * 2 ** ((t - 0.5) * (0.8 if event % 2 else -0.8))) / rate
        call = sum(np.sin(2 * np.pi * k * glide + rng.uniform(0, 6.3)) / k for k in (1, 2, 3)) * np.sin(np.pi * t)
        sound[at:at + n] += loudness * call / call.std()
    return torch.from_numpy((sound / np.abs(sound).max() * rng.uniform(0.3, 0.9)).astype(np.float32))


def demo_picture(events: Sequence[tuple[int, float]], contrast: float, rng: np.random.Generator, frames: int,
                 size: tuple[int, int]) -> Tensor:
    """Moving (class, opacity) shapes before a noisy texture: (frames, 3, H, W) uint8. Kind: shape; way: sideways, up and down."""
    height, width = size
    texture = F.interpolate(torch.from_numpy(rng.standard_normal((1, 3, 6, 6))), size, mode="bicubic")[0].numpy()
    movie = np.repeat((110 + 25 * texture)[None], frames, 0) + 12 * rng.standard_normal((frames, 1, height, width))
    for event, opacity in events:
        radius, color = rng.uniform(0.16, 0.24) * height, rng.uniform(0, 255, (3, 1, 1))
        y, x = rng.uniform(radius, height - radius), rng.uniform(radius, width - radius)
        speed = rng.choice([-1, 1]) * rng.uniform(0.4, 0.8) * height / frames
        for t in range(frames):
            moved = speed * (t - frames / 2)
            v, u = np.ogrid[:height, :width]
            u, v = (u - x - (0 if event % 2 else moved)) / radius, (v - y - (moved if event % 2 else 0)) / radius
            r, square = np.hypot(u, v), np.maximum(abs(u), abs(v))
            mask = (r < 1, (r < 1) & (r > 0.6), square < 0.85, (square < 1) & (np.minimum(abs(u), abs(v)) < 0.3),
                    (square < 1) & (abs(u + v) < 0.45))[event // 2]
            movie[t] += mask * contrast * opacity * (color - movie[t])
    return torch.from_numpy(movie.clip(0, 255).astype(np.uint8))


def demo_load(clip: Clip, student: str, seed: int, noise: float, mismatch: float, fps: float,
              size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Renders a demo clip: the student's modality ("audio" or "video") faint but true, the teacher's clear but subject to the dials."""
    rng = np.random.default_rng([seed + 1, *clip.id.encode()])
    shown, mixed = demo_truth(clip, seed, noise, mismatch)
    faint = [(event, 1.0) for event in clip.labels]
    clear = [(event, 1.0) for event in shown] + [(event, 0.6) for event in mixed]
    samples = demo_sound(*((faint, rng.uniform(-14, 0)) if student == "audio" else (clear, rng.uniform(3, 12))), rng)
    frames = demo_picture(*((faint, rng.uniform(0.15, 0.5)) if student == "video" else (clear, rng.uniform(0.7, 1.0))), rng,
                          max(1, round(fps)), size)
    return samples, frames


# ============================================== 6. Clip store and views
def even_windows(n: int, size: int = 16, count: int = 3) -> list[list[int]]:
    """Frame indices of at most `count` evenly spread windows of `size` out of n frames; ends at the first short one, looped. [A]"""
    stride = max(1, math.ceil((n - 1 - size) / max(count - 1, 1)))
    windows = []
    for begin in range(0, n, stride)[:count]:
        windows.append([begin + i % min(size, n - begin) for i in range(size)])
        if n - begin < size:
            break
    return windows


def sliding_windows(n: int, size: int = 16, stride: int = 16) -> list[list[int]]:
    """Frame indices of consecutive windows of `size` out of n frames; a last short one is looped. [A]"""
    return [[begin + i % min(size, n - begin) for i in range(size)] for begin in range(0, n, stride)]


class ClipStore:
    """Decoded clips in a folder of memory-mapped files: int16 samples at 32 kHz and one JPEG (quality 90) a frame."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        index = np.load(self.folder / "index.npz", allow_pickle=False)
        self.sample_at, self.frame_at, self.byte_at = index["sample_at"], index["frame_at"], index["byte_at"]
        self.skipped: list[tuple[int, str]] = [(i, r) for i, r in json.loads((self.folder / "skipped.json").read_text())]
        self._audio, self._video = (np.memmap(self.folder / name, kind, "r") if (self.folder / name).stat().st_size else np.zeros(0, kind)
                                    for name, kind in (("audio.int16", np.int16), ("video.jpeg", np.uint8)))

    def __reduce__(self) -> tuple[Any, ...]:
        return ClipStore, (self.folder,)                                # workers map the files anew instead of copying them

    def length(self, clip: int, modality: str) -> int:
        """Samples or frames of one clip."""
        at = self.sample_at if modality == "audio" else self.frame_at
        return int(at[clip + 1] - at[clip])

    def samples(self, clip: int, indices: Any) -> Tensor:
        """Samples at `indices` of one clip: (len(indices),) int16."""
        return torch.from_numpy(self._audio[self.sample_at[clip]:self.sample_at[clip + 1]][indices])

    def frames(self, clip: int, indices: Sequence[int]) -> Tensor:
        """Frames at `indices` of one clip: (len(indices), 3, H, W) uint8."""
        decoded = {}
        for i in set(indices):
            a, b = self.byte_at[self.frame_at[clip] + i:][:2]
            decoded[i] = decode_jpeg(torch.from_numpy(np.array(self._video[a:b])))
        return torch.stack([decoded[i] for i in indices])


class DecodeJobs(Dataset[Any]):
    """clip i -> (int16 samples, JPEG bytes of all frames, bytes per frame, reason if it was skipped)."""

    def __init__(self, clips: Sequence[Clip], load: Callable[[Clip], tuple[Tensor | None, Tensor | None]]) -> None:
        self.clips, self.load = clips, load

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor, str]:
        reason, samples, frames = "", None, None
        try:
            samples, frames = self.load(self.clips[i])
        except InputError as error:
            reason = str(error)
        pcm = (samples.clamp(-1, 1) * 32767).round().to(torch.int16) if samples is not None else torch.zeros(0, dtype=torch.int16)
        jpegs = [encode_jpeg(frame, quality=90) for frame in frames] if frames is not None else []
        packed = torch.cat(jpegs) if jpegs else torch.zeros(0, dtype=torch.uint8)
        return pcm, packed, torch.tensor([len(jpeg) for jpeg in jpegs], dtype=torch.int64), reason


def build_store(folder: str | os.PathLike[str], clips: Sequence[Clip], load: Callable[[Clip], tuple[Tensor | None, Tensor | None]],
                workers: int = 0, progress: Callable[[int, int], None] = lambda done, total: None) -> ClipStore:
    """Decodes every clip once into `folder`, or opens it where it is complete (it is renamed into place at the end)."""
    folder, building = Path(folder), Path(f"{folder}.{os.getpid()}.part")
    if not folder.exists():
        building.mkdir(parents=True)
        lengths: list[tuple[int, int]] = []
        sizes, skipped = [torch.zeros(1, dtype=torch.int64)], []
        with open(building / "audio.int16", "wb") as audio, open(building / "video.jpeg", "wb") as video:
            jobs = DataLoader(DecodeJobs(clips, load), batch_size=None, num_workers=workers)
            for i, (pcm, jpegs, frame_sizes, reason) in enumerate(jobs):
                audio.write(pcm.numpy())
                video.write(jpegs.numpy())
                lengths.append((len(pcm), len(frame_sizes)))
                sizes.append(frame_sizes)
                skipped += [(i, reason)] if reason else []
                progress(i + 1, len(clips))
        at = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(np.array(lengths, np.int64).reshape(-1, 2), 0)])
        np.savez(building / "index.npz", sample_at=at[:, 0], frame_at=at[:, 1], byte_at=torch.cat(sizes).cumsum(0).numpy())
        (building / "skipped.json").write_text(json.dumps(skipped))
        try:
            building.rename(folder)
        except OSError:                                                 # another process was faster: its folder is as good
            shutil.rmtree(building)
    return ClipStore(folder)


class ViewSpec(NamedTuple):
    """What a network gets to see of a clip. Frames and pixels for video, samples for audio."""
    modality: str                # "audio" or "video"
    frames: int = 16             # window length (authors: 16)
    size: int = 112              # side of the square view, pixels (authors: 112)
    samples: int = 320000        # window length at 32 kHz (PANNs: 10 s)
    crop_area: float = 0.25      # smallest area of a training crop (authors: 0.25)
    flip: bool = True            # mirror half of the training views (authors)
    strong: bool = False         # training views also turn grey, inverted, rotated (ours)


class Views(Dataset[Any]):
    """Views of stored clips. Key (i, seed) with protocol "train": one random view; else all windows of clip i, stacked.

    protocol  "train"; "val": 3 even windows (authors, while training); "test": consecutive windows (authors, final). Audio
              has consecutive windows in both. Everything random follows from the seed in the key, whatever the worker.
    teacher   optional (N, D) embeddings, handed out beside the training view
    """

    def __init__(self, store: ClipStore, labels: Tensor, spec: ViewSpec, protocol: str, teacher: Tensor | None = None) -> None:
        self.store, self.labels, self.spec, self.protocol = store, labels, spec, protocol
        self.teacher = torch.zeros(len(labels), 0) if teacher is None else teacher
        crop = [v2.RandomResizedCrop(spec.size, scale=(spec.crop_area, 1.0), antialias=True)]
        flip = [v2.RandomHorizontalFlip()] if spec.flip else []
        strong = [v2.RandomGrayscale(0.5), v2.RandomInvert(0.5), v2.RandomRotation(15)] if spec.strong else []
        self.transform = v2.Compose([*strong, *crop, *flip] if protocol == "train" else [v2.Resize(spec.size), v2.CenterCrop(spec.size)])

    def view(self, clip: int, indices: Any) -> Tensor:
        """One window: (samples,) int16 or (T, 3, size, size) uint8, cut the same way in every frame."""
        if self.spec.modality == "audio":
            return self.store.samples(clip, indices)
        return self.transform(self.store.frames(clip, indices))

    def __getitem__(self, key: Any) -> tuple[Tensor, Tensor, Tensor]:
        i, seed = key
        audio = self.spec.modality == "audio"
        n, size = self.store.length(i, self.spec.modality), self.spec.samples if audio else self.spec.frames
        if self.protocol == "train":
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(seed)
                start = int(torch.randint(n - size + 1 if n > size else n if audio else 1, ()))
                window = (start + np.arange(size)) % n                  # loops if short; a short sound at any phase
                return self.view(i, window if audio else window.tolist()), self.labels[i], self.teacher[i]
        if audio:
            starts = range(0, max(n - size // 2, 1), size)              # a tail under half a window is left out
            windows = [start + np.arange(size) % min(size, n - start) for start in starts]
        else:
            windows = even_windows(n, size) if self.protocol == "val" else sliding_windows(n, size, size)
        return torch.stack([self.view(i, w) for w in windows]), self.labels[i], self.teacher[i]


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Shuffled batches of (clip, view seed), a function of seed and `epoch` alone; a last batch of one joins the one before."""

    def __init__(self, indices: Sequence[int], batch_size: int, seed: int) -> None:
        self.indices, self.batch_size, self.seed, self.epoch = list(indices), batch_size, seed, 0

    def __len__(self) -> int:
        n = len(self.indices)
        return max(1, n // self.batch_size + (n % self.batch_size > 1))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(len(self.indices), generator=generator).tolist()
        seeds = torch.randint(2 ** 62, (len(order),), generator=generator).tolist()
        keys = [(self.indices[i], seed) for i, seed in zip(order, seeds)]
        for b in range(len(self)):
            yield keys[b * self.batch_size:None if b == len(self) - 1 else (b + 1) * self.batch_size]


def join_windows(items: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, list[int]]:
    """Clips' windows in one batch, and how many each has."""
    return torch.cat([windows for windows, _, _ in items]), [len(windows) for windows, _, _ in items]


# ============================================== 7. Metrics (fractions in 0..1)
def ranked(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each class sorted by falling score: hits 0/1 float64, 1-based rank of the first and of the last item of each tie. (N, C)."""
    order = scores.argsort(0, descending=True)
    values, hits = scores.gather(0, order), labels.double().gather(0, order)
    n = len(scores)
    rank = torch.arange(1, n + 1, device=scores.device)[:, None].expand_as(values)
    change = F.pad((values[1:] != values[:-1]), (0, 0, 1, 1), value=True)              # (N + 1, C) a new value begins
    first = torch.where(change[:-1], rank, 0).cummax(0).values
    last = torch.where(change[1:], rank, n).flip(0).cummin(0).values.flip(0)
    return hits, first, last


def mean_average_precision(scores: Tensor, labels: Tensor) -> float:
    """Macro mAP: scores (N, C), labels (N, C) 0/1 -> mean over the classes with a positive; ties as in scikit-learn.

    Raises ValueError where no class has a positive.
    """
    scores, labels = torch.as_tensor(scores), torch.as_tensor(labels)
    hits, _, last = ranked(scores, labels)
    totals, found = hits.sum(0), hits.cumsum(0).gather(0, last - 1)
    if not bool((totals > 0).any()):
        raise ValueError(f"mAP needs a class with a positive; none of {labels.shape[1]} classes has one in {len(labels)} clips")
    precision = (hits * found / last).sum(0) / totals.clamp_min(1)
    return float(precision[totals > 0].mean())


def mean_auc(scores: Tensor, labels: Tensor) -> float:
    """Macro area under the ROC curve: scores, labels (N, C) -> mean over classes with a positive and a negative; nan if none."""
    scores, labels = torch.as_tensor(scores), torch.as_tensor(labels)
    hits, first, last = ranked(scores, labels)
    n, positives = len(scores), hits.sum(0)
    negatives = n - positives
    ordered = (hits * (n - (first + last) / 2)).sum(0) - positives * (positives - 1) / 2   # (positive above negative) pairs
    return float((ordered / (positives * negatives))[(positives > 0) & (negatives > 0)].mean())


def topk_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of rows of scores (N, C) whose label (N,) is among the k highest; k is at most C."""
    scores, labels = torch.as_tensor(scores), torch.as_tensor(labels)
    return float((scores.topk(min(k, scores.shape[1]), dim=1).indices == labels[:, None]).any(1).double().mean())


def retrieval_metrics(queries: Tensor, gallery: Tensor, query_labels: Tensor, gallery_labels: Tensor,
                      ks: Sequence[int] = (1, 5, 10, 20, 50), topk: int = 500) -> dict[str, float]:
    """Retrieval by cosine: queries (Q, D), gallery (G, D), labels (Q,), (G,); an item is relevant if its label is the query's.

    R@k             share of queries with a relevant item among the k nearest
    mAP             average precision over the full ranking, mean over all queries; a query without relevant items counts 0
    mAP_released    the released scripts': ranking cut at `topk`, divided by the hits inside, queries without a hit left out
    """
    gallery = F.normalize(torch.as_tensor(gallery), dim=1)
    first_hits, precisions, released = [], [], []
    for part, labels in zip(torch.as_tensor(queries).split(256), torch.as_tensor(query_labels).split(256)):
        order = (F.normalize(part, dim=1) @ gallery.T).argsort(1, descending=True)
        hits = (torch.as_tensor(gallery_labels)[order] == labels[:, None])             # (256, G)
        precision = hits * hits.cumsum(1) / torch.arange(1, len(gallery) + 1, device=hits.device, dtype=torch.float64)
        first_hits.append(torch.where(hits.any(1), hits.int().argmax(1), len(gallery)))
        precisions.append(precision.sum(1) / hits.sum(1).clamp_min(1))
        cut = hits[:, :topk].sum(1)
        released.append((precision[:, :topk].sum(1) / cut)[cut > 0])
    first_hit = torch.cat(first_hits)
    result = {f"R@{k}": float((first_hit < k).double().mean()) for k in ks}
    shown = torch.cat(released)
    return {**result, "mAP": float(torch.cat(precisions).mean()), "mAP_released": float(shown.mean()) if len(shown) else 0.0}


def tagging_metrics(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """mAP, AUC and d' = sqrt(2) * probit(mean AUC), AUC kept within 1e-9 of 0 and 1. scores, labels (N, C)."""
    auc = mean_auc(scores, labels)
    d_prime = math.nan if math.isnan(auc) else math.sqrt(2) * statistics.NormalDist().inv_cdf(min(max(auc, 1e-9), 1 - 1e-9))
    return {"mAP": mean_average_precision(scores, labels), "AUC": auc, "d_prime": d_prime}


# ============================================== 8. Training and evaluation
@torch.no_grad()
def predict(network: nn.Module, loader: Any, prepare: Prepare, device: torch.device, several_tags: bool,
            progress: Callable[[int, int], None] = lambda done, total: None) -> tuple[Tensor, Tensor]:
    """Window-averaged probabilities (N, C) and embeddings (N, D) of a loader's clips, on the CPU; the network's mode is restored."""
    mode, scores, pooled = network.training, [], []
    network.eval()
    prepare.eval()
    for step, (windows, counts) in enumerate(loader):
        parts = [network(prepare(part.to(device))) for part in windows.split(64)]      # a long clip has many windows
        logits = torch.cat([part.logits for part in parts]).float()
        probabilities = logits.sigmoid() if several_tags else logits.softmax(1)
        scores += [p.mean(0).cpu() for p in probabilities.split(counts)]
        pooled += [p.mean(0).cpu() for p in torch.cat([part.pooled for part in parts]).float().split(counts)]
        progress(step + 1, len(loader))
    network.train(mode)
    return torch.stack(scores), torch.stack(pooled)


def train(network: nn.Module, noise_filter: ModalityNoiseFilter | None, optimizer: torch.optim.Optimizer, loader: Any,
          prepare: Prepare, after_epoch: Callable[[int, dict[str, float]], bool], progress: Callable[[int, int], None],
          epochs: int, first_epoch: int = 1, milestone: int = 150, seed: int = 3, device: torch.device = torch.device("cpu"),
          **step: Any) -> None:
    """Runs `train_step` over the epochs, lr / 10 after `milestone`; `after_epoch(epoch, mean losses)` returns True to stop.

    An epoch depends on seed and epoch number only (order, views, SpecAugment), so that a run can be taken up at any of them.
    """
    rates = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
    for epoch in range(first_epoch, epochs + 1):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * (0.1 if epoch > milestone else 1.0)
        loader.batch_sampler.epoch = epoch
        torch.manual_seed(1_000_003 * seed + epoch)
        prepare.train()
        sums: dict[str, Tensor] = {}
        for number, (views, labels, teacher) in enumerate(loader):
            terms = train_step(network, noise_filter, optimizer, prepare(views.to(device, non_blocking=True)),
                               teacher.to(device, non_blocking=True), labels.to(device, non_blocking=True), **step)
            sums = {name: sums.get(name, 0) + value for name, value in terms.items()}
            progress((epoch - first_epoch) * len(loader) + number + 1, (epochs - first_epoch + 1) * len(loader))
        losses = {name: float(value) / len(loader) for name, value in sums.items()}
        if not all(map(math.isfinite, losses.values())):
            raise InputError(f"the loss is not finite in epoch {epoch}: {losses}; lower --lr, checkpoints stay as they were")
        if after_epoch(epoch, losses):
            return


class Data(NamedTuple):
    """A data set ready to train on: decoded, unreadable clips gone from `train` and `eval`."""
    layout: str
    clips: list[Clip]
    classes: list[str]
    labels: Tensor               # (N,) class indices or (N, C) multi-hot float, by task
    store: ClipStore
    train: list[int]             # indices into clips
    eval: list[int]

    def loader(self, indices: Sequence[int], spec: ViewSpec, protocol: str, batch_size: int, workers: int, seed: int = 0,
               teacher: Tensor | None = None) -> Any:
        """Batches of training views (shuffled from `seed`), or of all windows of each clip in order."""
        views = Views(self.store, self.labels, spec, protocol, teacher)
        options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": torch.cuda.is_available()}
        if protocol == "train":
            return DataLoader(views, batch_sampler=EpochBatches(indices, batch_size, seed), **options)
        keys = [[(i, 0) for i in indices[b:b + batch_size]] for b in range(0, len(indices), batch_size)]
        return DataLoader(views, batch_sampler=keys, collate_fn=join_windows, **options)


def score(task: str, scores: Tensor, labels: Tensor) -> dict[str, float]:
    """The task's metrics from probabilities (N, C)."""
    if task == "audio_tagging":
        return tagging_metrics(scores, labels)
    return {"top1": topk_accuracy(scores, labels, 1), "top5": topk_accuracy(scores, labels, 5)}


def final_metrics(task: str, network: nn.Module, data: Data, spec: ViewSpec, prepare: Prepare, device: torch.device, batch_size: int,
                  workers: int) -> dict[str, float]:
    """The task's final protocol: consecutive windows of every clip; for retrieval, training clips are the gallery."""
    run = partial(predict, network, prepare=prepare, device=device, several_tags=data.labels.ndim == 2)
    scores, queries = run(data.loader(data.eval, spec, "test", batch_size, workers))
    metrics = score(task, scores, data.labels[data.eval])
    if task == "video_retrieval":
        _, gallery = run(data.loader(data.train, spec, "test", batch_size, workers))
        metrics = {**retrieval_metrics(queries, gallery, data.labels[data.eval], data.labels[data.train]), **metrics}
    return metrics


MAIN_METRIC = {"audio_tagging": "mAP", "action_recognition": "top1", "video_retrieval": "mAP"}
CHECK_METRIC = {**MAIN_METRIC, "video_retrieval": "top1"}       # picks the best epoch: retrieval is too dear to run each time
STUDENT = {"audio_tagging": "audio", "action_recognition": "video", "video_retrieval": "video"}
METHODS = ("student", "mnf", "csc", "xmkd")


def train_student(method: str, seed: int, data: Data, teacher: Tensor, spec: ViewSpec, settings: dict[str, Any], out: Path,
                  console: Console) -> dict[str, Any]:
    """One run of one method: trains, keeps the best and the last checkpoint in `out`, evaluates both -> results."""
    begun, task, device = time.time(), settings["task"], torch.device(settings["device"])
    batch_size, workers = settings["batch_size"], settings["workers"]
    torch.manual_seed(seed)
    network = make_network(spec.modality, len(data.classes), settings["width"]).to(device)
    noise_filter = None
    if method != "student":
        noise_filter = ModalityNoiseFilter(len(data.classes), 8 * settings["width"], teacher_dim=teacher.shape[1]).to(device)
    optimizer = make_optimizer(network, noise_filter, settings["lr"], settings["weight_decay"])
    best, first_epoch, spent = -1.0, 1, 0.0
    about = {"task": task, "method": method, "seed": seed, "classes": data.classes, "settings": settings, "versions": versions(),
             "network": {"modality": spec.modality, "num_classes": len(data.classes), "width": settings["width"]}}
    out.mkdir(parents=True, exist_ok=True)
    if settings["resume"] and (out / "last.pt").exists():
        saved = load_checkpoint(out / "last.pt")
        harmless = {"workers", "device", "epochs", "out", "cache", "quiet", "resume", "method", "compare", "seeds", "seed"}
        for name in settings:
            if name not in harmless and saved["settings"].get(name) != settings[name]:
                raise InputError(f"--resume: {name} was {saved['settings'].get(name)!r} in {out / 'last.pt'} and is now {settings[name]!r}; "
                                 f"pass the old value or another --out")
        network.load_state_dict(saved["student"])
        if noise_filter is not None:
            noise_filter.load_state_dict(saved["filter"])
        optimizer.load_state_dict(saved["optimizer"])
        best, first_epoch, spent = saved["best"], saved["epoch"] + 1, saved["seconds"]
    elif (out / "log.jsonl").exists():
        (out / "log.jsonl").unlink()
    write_json(out / "config.json", {**about, "parameters": sum(p.numel() for p in network.parameters())})

    prepare = Prepare().to(device)
    loader = data.loader(data.train, spec, "train", batch_size, workers, seed, teacher)
    checks = data.loader(data.eval, spec, "val", batch_size, workers)

    def after_epoch(epoch: int, losses: dict[str, float]) -> bool:
        nonlocal best
        row: dict[str, Any] = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], **losses}
        if epoch % settings["eval_every"] == 0 or epoch == settings["epochs"]:
            scores, _ = predict(network, checks, prepare, device, data.labels.ndim == 2)
            row.update(score(task, scores, data.labels[data.eval]), seconds=round(spent + time.time() - begun, 2))
            console.say(f"  {method} s{seed} epoch {epoch}/{settings['epochs']}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "epoch"))
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
        checked = row.get(CHECK_METRIC[task], -1.0)
        content = {**about, "epoch": epoch, "best": max(best, checked), "seconds": spent + time.time() - begun, "metrics": row,
                   "student": network.state_dict(), "filter": noise_filter.state_dict() if noise_filter is not None else {}}
        if checked > best:
            best = checked
            save_checkpoint(out / "best.pt", content)
        if "seconds" in row:
            save_checkpoint(out / "last.pt", {**content, "optimizer": optimizer.state_dict()})
        return False

    train(network, noise_filter, optimizer, loader, prepare, after_epoch, console.progress(f"{method} s{seed}"), settings["epochs"],
          first_epoch, math.ceil(0.75 * settings["epochs"]), seed, device, offset=settings["csc_offset"], margin=settings["margin"],
          sparsity=settings["sparsity"], method=method)
    finals = {}
    for name in ("last", "best"):
        saved = load_checkpoint(out / f"{name}.pt")
        network.load_state_dict(saved["student"])
        finals[name] = {**final_metrics(task, network, data, spec, prepare, device, batch_size, workers), "epoch": saved["epoch"]}
    results = {"task": task, "data": settings["data"], "method": method, "seed": seed, "metrics": finals["best"], "metrics_last": finals["last"],
               "clips": {"train": len(data.train), "eval": len(data.eval)}, "seconds": round(spent + time.time() - begun, 1)}
    write_json(out / "results.json", results)
    return results


# ============================================== 9. Teacher
class KineticsTeacher(nn.Module):
    """torchvision's r2plus1d_18 trained on Kinetics-400, fed with ImageNet-normalised (B, 3, T, H, W); embedding 512-d."""

    def __init__(self, progress: bool = False) -> None:
        super().__init__()
        self.net = r2plus1d_18(weights=R2Plus1D_18_Weights.KINETICS400_V1, progress=progress)
        self.fc, self.net.fc = self.net.fc, nn.Identity()
        stats = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], [0.43216, 0.394666, 0.37645], [0.22803, 0.22145, 0.216989])
        for name, values in zip(("mean", "std", "kinetics_mean", "kinetics_std"), stats):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1, 1))

    def forward(self, frames: Tensor) -> Features:
        """(B, 3, T, H, W) -> Features with K = 1; logits are those of Kinetics-400."""
        pooled = self.net((frames * self.std + self.mean - self.kinetics_mean) / self.kinetics_std)
        return Features(pooled[:, None], pooled, self.fc(pooled))


def train_teacher(data: Data, spec: ViewSpec, settings: dict[str, Any], console: Console) -> tuple[nn.Module, dict[str, Any]]:
    """A teacher from scratch, with augmentation, stopped on a held-out tenth of the training clips -> network, its scores."""
    task, device, seed = settings["task"], torch.device(settings["device"]), settings["seed"]
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, len(order) // 10)
    held, seen = [data.train[i] for i in order[:count]], [data.train[i] for i in order[count:]]
    if len(seen) < 2:
        raise InputError(f"{len(data.train)} training clips are too few to train a teacher on; pass --teacher FILE or more clips")
    torch.manual_seed(seed)
    network, prepare = make_network(spec.modality, len(data.classes), settings["width"]).to(device), Prepare().to(device)
    optimizer = make_optimizer(network, None, settings["lr"], settings["weight_decay"])
    checks = data.loader(held, spec, "test", settings["batch_size"], settings["workers"])
    best: dict[str, Any] = {"value": -1.0, "epoch": 0, "state": {}}
    patience = max(5, settings["teacher_epochs"] // 3)

    def after_epoch(epoch: int, losses: dict[str, float]) -> bool:
        scores, _ = predict(network, checks, prepare, device, data.labels.ndim == 2)
        value = score(task, scores, data.labels[held])[CHECK_METRIC[task]]
        if value > best["value"]:
            best.update(value=value, epoch=epoch, state={k: v.clone() for k, v in network.state_dict().items()})
        return epoch - best["epoch"] >= patience

    loader = data.loader(seen, spec, "train", settings["batch_size"], settings["workers"], seed)
    train(network, None, optimizer, loader, prepare, after_epoch, console.progress(f"teacher ({spec.modality}, from scratch)"),
          settings["teacher_epochs"], milestone=math.ceil(0.75 * settings["teacher_epochs"]), seed=seed, device=device, method="student")
    network.load_state_dict(best["state"])
    known, _ = predict(network, data.loader(seen[:count], spec, "test", settings["batch_size"], 0), prepare, device, data.labels.ndim == 2)
    return network, {"epoch": best["epoch"], "held_out_clips": count, "held_out": best["value"],
                     "trained_on": score(task, known, data.labels[seen[:count]])[CHECK_METRIC[task]]}


def load_teacher(data: Data, spec: ViewSpec, settings: dict[str, Any], console: Console) -> tuple[nn.Module, dict[str, Any]]:
    """The network behind --teacher: a checkpoint, the public pretrained one, or one trained here -> network, what it is."""
    choice = settings["teacher"]
    if choice not in ("auto", "scratch"):
        saved = load_checkpoint(choice)
        if saved["network"]["modality"] != spec.modality:
            raise InputError(f"--teacher {choice} is a network for {saved['network']['modality']}, but --task {settings['task']} needs one for {spec.modality}")
        network = make_network(**saved["network"])
        network.load_state_dict(saved["student"])
        return network, {"kind": "checkpoint", "file": choice, "same_classes": saved["classes"] == data.classes}
    if choice == "auto" and settings["layout"] != "demo":
        if spec.modality == "video":
            try:
                return KineticsTeacher(progress=console.terminal), {"kind": "torchvision r2plus1d_18, Kinetics-400", "same_classes": False}
            except OSError as error:
                console.warn(f"torchvision's r2plus1d_18 could not be downloaded ({error}); the video teacher is trained from scratch, which is weaker")
        else:
            console.warn("no public audio network comes with torchaudio; the audio teacher is trained from scratch, which is weaker: "
                         "pass a pretrained one with --teacher FILE")
    network, info = train_teacher(data, spec, settings, console)
    return network, {"kind": "scratch", "same_classes": True, **info}


def embed_clips(data: Data, spec: ViewSpec, settings: dict[str, Any], cache: Path, key: str, console: Console) -> tuple[Tensor, dict[str, Any]]:
    """Teacher embeddings (N, D) of all clips, zeros where not needed; kept in `cache` under a key of all they depend on."""
    task, device = settings["task"], torch.device(settings["device"])
    path = cache / f"teacher-{key}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        return saved["embeddings"], saved["info"]
    network, info = load_teacher(data, spec, settings, console)
    network.to(device)
    prepare = Prepare().to(device)
    loader = data.loader(data.train, spec, "test", settings["batch_size"], settings["workers"])
    _, pooled = predict(network, loader, prepare, device, data.labels.ndim == 2, console.progress("teacher embeddings"))
    embeddings = torch.zeros(len(data.clips), pooled.shape[1])
    embeddings[data.train] = pooled
    shared = [i for i in data.eval if data.store.length(i, spec.modality)]
    if info.pop("same_classes") and shared:
        scores, _ = predict(network, data.loader(shared, spec, "test", settings["batch_size"], settings["workers"]), prepare, device, data.labels.ndim == 2)
        info.update(eval_clips=len(shared), metrics=score(task, scores, data.labels[shared]))
    save_checkpoint(path, {"embeddings": embeddings, "info": info})
    return embeddings, info


# ============================================== 10. Run support
class Console:
    """Lines for people: on a terminal progress rewrites one line, elsewhere it is a plain line every 20 seconds; `quiet` mutes both."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self.terminal, self.warnings = quiet, sys.stdout.isatty(), []

    def say(self, text: str) -> None:
        """One line on stdout."""
        if not self.quiet:
            print(("\r\x1b[K" if self.terminal else "") + text, flush=True)

    def warn(self, text: str) -> None:
        """One line on stderr, kept for results.json."""
        self.warnings.append(text)
        print(("\r\x1b[K" if self.terminal else "") + f"warning: {text}", file=sys.stderr, flush=True)

    def progress(self, label: str) -> Callable[[int, int], None]:
        """A function of (done, total) that shows the share done and the time left."""
        begun = shown = time.time()

        def show(done: int, total: int) -> None:
            nonlocal shown
            now = time.time()
            if not self.quiet and now - shown > (0.2 if self.terminal else 20):
                shown, left = now, (now - begun) / done * (total - done)
                line = f"  {label}: {done:,}/{total:,} ({done / total:.0%}), {left / 60:.0f} min {left % 60:02.0f} s left"
                print(f"\r\x1b[K{line}" if self.terminal else line, end="" if self.terminal else "\n", flush=True)
        return show


def versions() -> dict[str, str]:
    """What a result may depend on."""
    return {"xmkd": __version__, "python": sys.version.split()[0], "torch": str(torch.__version__), "av": av.__version__}


def write_json(path: Path, content: Any) -> None:
    """Indented JSON, written beside and renamed, so that no reader sees half a file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(part, path)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Tensors and plain Python only; written beside, flushed to disk, renamed."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint of this program: a dict with state dicts `student` (VideoNet or AudioNet) and `filter` (ModalityNoiseFilter,
    empty for the student alone), `network` (its sizes), `classes`, `settings`, `epoch`. Runs no code of the file. Raises InputError.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds
        raise InputError(f"{path} is no readable checkpoint ({str(error).splitlines()[0][:120]})") from error
    if not isinstance(content, dict) or not {"student", "network", "classes"} <= content.keys():
        raise InputError(f"{path} is no checkpoint of this program: it lacks 'student', 'network' or 'classes'")
    return content


def digest(*parts: Any) -> str:
    """Twelve hexadecimal digits that change when any of the parts does."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


# ============================================== 11. Arguments and main
RECIPES: dict[str, dict[str, Any]] = {       # METHOD 6 where marked authors; the layout's column wins over "all"
    "all": {"epochs": 200, "teacher_epochs": 60, "eval_every": 5, "batch_size": 32, "lr": 3e-4, "weight_decay": 5e-4, "csc_offset": 0.07,
            "margin": 0.2, "sparsity": 1e-3, "width": 64, "frames": 16, "size": 112, "fps": 4.0, "seconds": 10.0, "crop_area": 0.25, "flip": True,
            "strong": False, "noise": 0.0, "mismatch": 0.0},
    "audioset": {"epochs": 60},              # about as many updates on the balanced list as 200 epochs of UCF51
    "demo": {"epochs": 15, "teacher_epochs": 15, "lr": 1e-3, "width": 8, "frames": 8, "size": 32, "fps": 8.0, "seconds": 1.0, "crop_area": 0.5,
             "noise": 0.3, "mismatch": 0.2},
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """The command line. Options left out (None) come from the checkpoint, else from the recipe of the data set."""
    parser = argparse.ArgumentParser(prog="xmkd.py", formatter_class=HelpFormatter, description="Robust cross-modal knowledge distillation "
                                     "(arXiv 2304.07775): a noise-filtered teacher of one modality trains a student of the other.",
                                     epilog="Exit codes: 0 done, 2 bad input, 130 interrupted.")

    def add(group: Any, name: str, help: str, kind: Any = None, **more: Any) -> None:
        key = name.replace("-", "_")
        known = [f"{recipe[key]}{'' if layout == 'all' else ' ' + layout}" for layout, recipe in RECIPES.items() if key in recipe]
        group.add_argument(f"--{name}", help=help + (f" (default: {', '.join(known)})" if known else ""), **({"type": kind} if kind else {}), **more)

    g = parser.add_argument_group("task and data")
    add(g, "task", "what the student learns (default: audio_tagging, or the checkpoint's)", choices=sorted(STUDENT))
    add(g, "data", "'demo' or a folder: AudioSet, UCF-101, or train/<label>/*, val/<label>/*", default="demo")
    add(g, "split", "AudioSet's training list", choices=["balanced", "unbalanced", "all"], default="balanced")
    add(g, "fold", "UCF-101's split", int, choices=[1, 2, 3], default=1)
    add(g, "noise", "demo: share of teacher views with irrelevant content mixed in, 0..1", float)
    add(g, "mismatch", "demo: share of training clips whose teacher modality contradicts the label or says nothing, 0..1", float)
    add(g, "max-skipped", "largest share of unreadable clips, 0..1; above it the run stops", float, default=0.2)
    g = parser.add_argument_group("views")
    add(g, "frames", "frames a view (authors)", int)
    add(g, "size", "side of the square view, pixels (authors)", int)
    add(g, "fps", "frames a second (authors)", float)
    add(g, "seconds", "longest sound a view, seconds (PANNs)", float)
    add(g, "crop-area", "smallest area of a training crop, 0..1 (authors)", float)
    add(g, "flip", "mirror half of the training views (authors); switch off where left and right matter, as in writing", action=argparse.BooleanOptionalAction)
    add(g, "strong", "training views also turn grey, inverted, rotated (ours); for small data sets", action=argparse.BooleanOptionalAction)
    g = parser.add_argument_group("method")
    add(g, "method", "xmkd: MNF + CSC; mnf: constant temperature; csc: unfiltered teacher; student: no distillation (default: xmkd)", choices=METHODS)
    add(g, "compare", "comma-separated methods to train from the same seeds and teacher embeddings; default on the demo: student,xmkd")
    add(g, "teacher", "auto: the public pretrained network, else from scratch; scratch; or FILE, a checkpoint of the other modality", default="auto")
    add(g, "teacher-epochs", "longest training of a teacher from scratch (ours)", int)
    add(g, "csc-offset", "added to the similarity to make CSC's temperature (authors: 0.07 UCF51, 0.2 ActivityNet)", float)
    add(g, "margin", "of the triplet term, cosine (authors)", float)
    add(g, "sparsity", "weight of the filter's L1 term (authors)", float)
    add(g, "width", "channels of the student's first stage; D is 8 times that (authors)", int)
    g = parser.add_argument_group("optimisation")
    add(g, "epochs", "passes over the training clips; the rate falls to a tenth after three quarters (authors)", int)
    add(g, "batch-size", "clips a step (authors: 32 UCF51, 64 ActivityNet)", int)
    add(g, "lr", "Adam's rate for the student; the filter learns at a fifth of it (authors)", float)
    add(g, "weight-decay", "Adam's coupled L2 (authors)", float)
    add(g, "eval-every", "epochs between evaluations (authors)", int)
    g = parser.add_argument_group("run")
    add(g, "seed", "first seed (authors: 3)", int, default=3)
    add(g, "seeds", "how many seeds, counted up from --seed; mean and spread are printed", int, default=1)
    add(g, "out", "run folder (default: runs/<task>-<data>-<method>-s<seed>)")
    add(g, "cache", "folder of decoded clips and teacher embeddings, may be shared by runs (default: <out>/cache)")
    add(g, "eval", "evaluate this checkpoint instead of training", metavar="CHECKPOINT")
    add(g, "resume", "go on from <out>/last.pt where there is one", action="store_true")
    add(g, "workers", "loader processes", int, default=min(8, (os.cpu_count() or 2) // 2))
    add(g, "device", "cpu, cuda, cuda:1", default="cuda" if torch.cuda.is_available() else "cpu")
    add(g, "quiet", "print errors and warnings only", action="store_true")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def read_data(settings: dict[str, Any], skipped: list[tuple[str, str]]) -> tuple[list[Clip], list[str]]:
    """Finds out the layout (kept in settings) and reads it."""
    root, task = settings["data"], settings["task"]
    if settings["layout"] == "demo":
        return demo_clips(task == "audio_tagging")
    if settings["layout"] == "audioset":
        if task != "audio_tagging":
            raise InputError(f"--task {task} needs one label a clip, AudioSet's clips have several; use --task audio_tagging")
        return read_audioset(root, settings["split"], skipped)
    return read_ucf101(root, settings["fold"], skipped) if settings["layout"] == "ucf101" else read_folder(root, skipped)


def find_layout(root: str) -> str:
    """Which of the known layouts a folder has. Raises InputError naming those looked for."""
    if root == "demo":
        return "demo"
    if not os.path.isdir(root):
        raise InputError(f"--data {root} is not a folder; give one, or 'demo'")
    inside = {name.lower() for name in os.listdir(root)}
    if "ucftraintestlist" in inside:
        return "ucf101"
    if next(Path(root).rglob("class_labels_indices.csv"), None):
        return "audioset"
    if {"train", "val"} & inside:
        return "folder"
    raise InputError(f"--data {root} has no known layout; looked for AudioSet (class_labels_indices.csv), UCF-101 (ucfTrainTestlist/), "
                     f"and a folder of folders (train/<label>/*, val/<label>/*)")


def prepare_data(settings: dict[str, Any], cache: Path, out: Path, splits: Sequence[str], console: Console) -> Data:
    """Indexes and decodes the data set, prints what was found, writes skipped.csv."""
    skipped: list[tuple[str, str]] = []
    clips, classes = read_data(settings, skipped)
    missing = {part: sum(reason.startswith("missing") for _, reason in skipped) for part in ("all",)}["all"]
    clips = [clip for clip in clips if clip.split in splits]
    counts = {part: sum(clip.split == part for clip in clips) for part in splits}
    console.say(f"data   {settings['data']} ({settings['layout']}): {len(classes)} classes; clips with a file: "
                + ", ".join(f"{part} {n:,}" for part, n in counts.items())
                + f"; {len(clips):,} of {len(clips) + missing:,} listed clips found ({len(clips) / max(1, len(clips) + missing):.1%})")
    for part, n in counts.items():
        if n == 0:
            raise InputError(f"the {part} split of {settings['data']} is empty; it needs at least one clip with a file")
    student = STUDENT[settings["task"]]
    both = ("audio", "video")
    # training clips need both streams for every method, so that all train on the same clips; so does UCF51, as the authors have it
    wanted = {"train": both, "eval": both if settings["layout"] in ("ucf101", "demo") or settings["need_teacher"] else (student,)}
    if len(splits) == 1 or settings["eval"]:
        wanted = {"train": (student,), "eval": (student,)}
    size = (round(settings["size"] * 128 / 112), round(settings["size"] * 171 / 112))
    if settings["layout"] == "demo":
        load: Any = partial(demo_load, student=student, seed=settings["seed"], noise=settings["noise"], mismatch=settings["mismatch"],
                            fps=settings["fps"], size=size)
        key = digest(clips, [settings[k] for k in ("seed", "noise", "mismatch", "fps")], size, student)
    else:
        load = partial(load_clip, wanted=wanted, fps=settings["fps"], size=size)
        stats = [os.stat(p) for clip in clips for p in {clip.audio, clip.video} if p]
        key = digest(clips, [(s.st_size, s.st_mtime_ns) for s in stats], wanted, settings["fps"], size)
    store = build_store(cache / f"clips-{key}", clips, load, settings["workers"], console.progress("decoding"))
    dropped = dict(store.skipped)
    for i, reason in store.skipped:
        skipped.append((clips[i].audio or clips[i].video or clips[i].id, reason.split(": ", 1)[-1]))
    with (out / "skipped.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([("path", "reason"), *skipped])
    if skipped:
        console.say(f"       left out: {len(skipped):,} clips, {len(dropped):,} of them unreadable; see {out / 'skipped.csv'}")
    if len(dropped) > settings["max_skipped"] * len(clips):
        raise InputError(f"{len(dropped):,} of {len(clips):,} clips are unreadable, more than --max-skipped {settings['max_skipped']:g} allows; "
                         f"first: {store.skipped[0][1]}")
    several = settings["task"] == "audio_tagging"
    labels = torch.zeros(len(clips), len(classes)) if several else torch.tensor([clip.labels[0] for clip in clips])
    if several:
        for i, clip in enumerate(clips):
            labels[i, list(clip.labels)] = 1.0
    train, evaluation = ([i for i, clip in enumerate(clips) if clip.split == part and i not in dropped] for part in ("train", "eval"))
    trained = {label for i in train for label in clips[i].labels}
    if "train" in splits and len(trained) < len(classes):
        console.warn(f"{len(classes) - len(trained)} classes have no training clip, such as {next(c for k, c in enumerate(classes) if k not in trained)!r}")
    return Data(settings["layout"], clips, classes, labels, store, train, evaluation)


def make_spec(modality: str, data: Data, settings: dict[str, Any]) -> ViewSpec:
    """The views of one modality; a sound view is as long as the longest clip, at most --seconds."""
    longest = max((data.store.length(i, "audio") for i in range(len(data.clips))), default=0)
    samples = min(round(settings["seconds"] * 32000), max(longest, 32000 * 4 // 10))
    return ViewSpec(modality, settings["frames"], settings["size"], samples, settings["crop_area"], settings["flip"], settings["strong"])


def print_table(task: str, rows: dict[str, list[dict[str, float]]], console: Console) -> None:
    """One line a method: mean of every metric, and its spread over the seeds where there are several."""
    names = [name for name in next(iter(rows.values()))[0] if name != "epoch"]
    console.say("")
    console.say(f"{'':<10}" + "".join(f"{name:>16}" for name in names))
    for method, runs in rows.items():
        cells = []
        for name in names:
            values = [run[name] for run in runs if name in run]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        console.say(f"{method:<10}" + "".join(f"{cell:>16}" for cell in cells))


def evaluate_checkpoint(saved: dict[str, Any], settings: dict[str, Any], out: Path, console: Console) -> None:
    """--eval: the task's final protocol on the eval split."""
    splits = ("train", "eval") if settings["task"] == "video_retrieval" else ("eval",)
    data = prepare_data(settings, Path(settings["cache"] or out / "cache"), out, splits, console)
    if data.classes != saved["classes"]:
        raise InputError(f"--eval {settings['eval']} knows {len(saved['classes'])} classes ({', '.join(saved['classes'][:3])}, ...), "
                         f"--data {settings['data']} has {len(data.classes)} ({', '.join(data.classes[:3])}, ...); they must be the same, in the same order")
    device = torch.device(settings["device"])
    network = make_network(**saved["network"]).to(device)
    network.load_state_dict(saved["student"])
    metrics = final_metrics(settings["task"], network, data, make_spec(saved["network"]["modality"], data, settings), Prepare().to(device), device,
                            settings["batch_size"], settings["workers"])
    write_json(out / "results.json", {"task": settings["task"], "data": settings["data"], "method": saved["method"], "seed": saved["seed"], "metrics": metrics,
                                      "teacher": None, "clips": {"eval": len(data.eval)}, "checkpoint": settings["eval"]})
    print_table(settings["task"], {saved["method"]: [metrics]}, console)


def run(args: argparse.Namespace) -> None:
    """What `main` does once the command line is parsed."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    console = Console(args.quiet)
    layout = find_layout(args.data)
    saved = load_checkpoint(args.eval) if args.eval else None
    settings = {**vars(args), **RECIPES["all"], **RECIPES.get(layout, {}), **(saved["settings"] if saved else {}), **given, "layout": layout}
    settings["task"] = args.task or (saved["task"] if saved else "audio_tagging")
    if saved and saved["task"] != settings["task"]:
        raise InputError(f"--eval {args.eval} is a checkpoint of --task {saved['task']}, not of {settings['task']}")
    if args.method and args.compare:
        raise InputError(f"--method {args.method} and --compare {args.compare} exclude each other; give one")
    if args.eval and (args.compare or args.resume or args.method):
        raise InputError("--eval evaluates one checkpoint; it excludes --compare, --method and --resume")
    methods = args.compare.split(",") if args.compare else [args.method] if args.method else ["student", "xmkd"] if layout == "demo" else ["xmkd"]
    for method in methods:
        if method not in METHODS:
            raise InputError(f"--compare {args.compare}: unknown method {method!r}; choose from {', '.join(METHODS)}")
    for name, low, high in (("noise", 0, 1), ("mismatch", 0, 1), ("max_skipped", 0, 1), ("crop_area", 0.01, 1), ("csc_offset", 1e-6, 10), ("width", 2, 1024),
                            ("epochs", 1, 10 ** 6), ("teacher_epochs", 1, 10 ** 6), ("eval_every", 1, 10 ** 6), ("batch_size", 2, 10 ** 6), ("frames", 1, 10 ** 4),
                            ("size", 16, 4096), ("fps", 0.01, 240), ("seconds", 0.4, 3600), ("seeds", 1, 1000), ("workers", 0, 256)):
        if not low <= settings[name] <= high:
            raise InputError(f"--{name.replace('_', '-')} {settings[name]} is out of range; it must lie between {low} and {high}")
    label = "compare" if len(methods) > 1 else methods[0]
    source = "demo" if layout == "demo" else Path(args.data).resolve().name
    out = Path(args.out or f"runs/{settings['task']}-{source}-{label}-s{args.seed}" + ("-eval" if saved else ""))
    out.mkdir(parents=True, exist_ok=True)
    if saved:
        settings["need_teacher"] = False
        return evaluate_checkpoint(saved, settings, out, console)

    begun, cache = time.time(), Path(args.cache or out / "cache")
    cache.mkdir(parents=True, exist_ok=True)
    settings["need_teacher"] = False
    data = prepare_data(settings, cache, out, ("train", "eval"), console)
    modality = STUDENT[settings["task"]]
    spec = make_spec(modality, data, settings)
    other = make_spec("audio" if modality == "video" else "video", data, settings)
    console.say(f"recipe {', '.join(f'{k} {settings[k]}' for k in RECIPES['all'])}")
    relevant = {k: settings[k] for k in ("task", "seed", "teacher_epochs", "batch_size", "lr", "weight_decay", "width")}
    teacher, info = torch.zeros(len(data.clips), 8 * settings["width"]), {"kind": "none"}
    if methods != ["student"]:
        choice = args.teacher if args.teacher in ("auto", "scratch") else digest(Path(args.teacher).read_bytes().hex())
        teacher, info = embed_clips(data, other, settings, cache, digest(data.store.folder.name, other, relevant, choice), console)
        console.say(f"teacher {info}")
    rows: dict[str, list[dict[str, float]]] = {"teacher": [info["metrics"]]} if "metrics" in info else {}
    for method in methods:
        for seed in range(args.seed, args.seed + args.seeds):
            folder = out if len(methods) == args.seeds == 1 else out / f"{method}-s{seed}"
            results = {**train_student(method, seed, data, teacher, spec, settings, folder, console), "teacher": info, "warnings": console.warnings}
            write_json(folder / "results.json", results)
            rows.setdefault(method, []).append(results["metrics"])
    if len(methods) > 1 or args.seeds > 1:
        write_json(out / "results.json", {**results, "method": label, "seed": args.seed, "seeds": args.seeds, "metrics": rows, "seconds": round(time.time() - begun, 1)})
    print_table(settings["task"], rows, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
