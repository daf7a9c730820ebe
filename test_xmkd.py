"""Tests of xmkd.py, in the file's order. No network, no GPU; clips are encoded here with PyAV.

Tests marked `needs_testdata` compare with numbers and lists that are not part of this repository; they run where the
environment variable XMKD_TESTDATA names their folder, and skip elsewhere.
"""
import ast
import csv
import errno
import fcntl
import functools
import gzip
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import xmkd

torch.set_num_threads(1)                       # small tensors: more threads only get in each other's way
HERE = Path(__file__).parent
TESTDATA = Path(os.environ.get("XMKD_TESTDATA", "/nowhere")).resolve()
needs_testdata = pytest.mark.skipif(not TESTDATA.is_dir(), reason="XMKD_TESTDATA names no folder: no reference numbers, no real lists")


def stress(test):
    """Marks a test that takes long: `pytest -m stress` runs it, any other command leaves it out."""
    asked = any("stress" in value and "not stress" not in value for value in sys.argv[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                  # a mark is registered in files that this project does without
        mark = pytest.mark.stress
    return pytest.mark.skipif(not asked, reason="slow; python -m pytest -m stress runs it")(mark(test))


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ 1. method
def test_csc_of_two_clips_worked_by_hand():
    # cosines: rows p = (1,0), (0,1) against s^ = (1,0), (0.6,0.8) -> [[1, .6], [0, .8]]
    # temperatures: similarity [[.43, 0], [-1, .93]] + .07, the -1 counted as 0 -> [[.5, .07], [.07, 1]]
    # logits: [[2, 8.571429], [0, .8]]; own class only: -log softmax = 6.572827 and log(1 + e^-.8) = .371101
    p, e = torch.eye(2), torch.tensor([[2.0, 0.0], [3.0, 4.0]])
    loss = xmkd.csc_loss(p, e, torch.tensor([[0.43, 0.0], [-1.0, 0.93]]), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((math.log(1 + math.exp(8.571429 - 2)) + math.log(1 + math.exp(-0.8))) / 2, abs=1e-5)


@pytest.mark.parametrize("tags", [False, True])
def test_csc_agrees_with_a_double_loop(tags):
    B, p, e = 7, rand(7, 5, seed=1) - 0.3, rand(7, 5, seed=2) - 0.3
    similarity = rand(7, 7, seed=3) * 2 - 1
    labels = (rand(B, 4, seed=4) > 0.5).long() if tags else torch.tensor([0, 1, 0, 2, 1, 0, 3])
    total = 0.0
    for i in range(B):
        z = [float(F.cosine_similarity(p[i], e[j], dim=0)) / (max(float(similarity[i, j]), 0) + 0.2) for j in range(B)]
        weights = []
        for j in range(B):
            if tags:
                a, b = set(labels[i].nonzero().flatten().tolist()), set(labels[j].nonzero().flatten().tolist())
                weights.append(len(a & b) / len(a | b) if a | b else 1.0)
            else:
                weights.append(float(labels[i] == labels[j]))
        terms = [-math.log(math.exp(z[j]) / sum(map(math.exp, z)) + 1e-10) for j in range(B)]
        total += sum(w * t for w, t in zip(weights, terms)) / sum(weights)
    assert xmkd.csc_loss(p, e, similarity, labels, 0.2).item() == pytest.approx(total / B, rel=1e-5)


def test_csc_laws():
    p, e, s, y = rand(6, 4), rand(6, 4, seed=1), rand(6, 6, seed=2), torch.tensor([0, 0, 1, 2, 1, 3])
    loss, order = xmkd.csc_loss(p, e, s, y), torch.tensor([3, 1, 5, 0, 4, 2])
    assert torch.allclose(loss, xmkd.csc_loss(p[order], e[order], s[order][:, order], y[order]))          # order of clips
    assert torch.allclose(loss, xmkd.csc_loss(p * 7, e * 0.1, s, y))                                      # scale
    assert torch.allclose(loss, xmkd.csc_loss(p, e, s, F.one_hot(y)))                                     # one tag = a class
    ones = torch.ones(6, 4)
    assert xmkd.csc_loss(ones, ones, torch.ones(6, 6), y).item() == pytest.approx(math.log(6), abs=1e-5)  # nothing to tell apart
    assert xmkd.csc_loss(p.double(), e.double(), s.double(), y).dtype == torch.float64


def test_csc_refuses_what_would_break_the_temperature():
    p, y = rand(3, 4), torch.arange(3)
    with pytest.raises(ValueError, match="detach"):
        xmkd.csc_loss(p, p, rand(3, 3).requires_grad_(), y)
    with pytest.raises(ValueError, match="offset is 0"):
        xmkd.csc_loss(p, p, rand(3, 3), y, offset=0)


def test_label_overlap_is_jaccard_and_equality_for_classes():
    tags = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 0], [0, 0, 0]])
    expected = torch.tensor([[1, 1 / 3, 1, 0], [1 / 3, 1, 1 / 3, 0], [1, 1 / 3, 1, 0], [0, 0, 0, 1]])
    assert torch.allclose(xmkd.label_overlap(tags), expected)
    assert torch.equal(xmkd.label_overlap(torch.tensor([2, 0, 2])), torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]]))


def test_filter_losses_agree_with_loops():
    w = rand(3, 4) - 0.5
    assert xmkd.sparsity_loss(w).item() == pytest.approx(sum(abs(float(v)) for row in w for v in row) / 3, rel=1e-6)
    p, t, c = rand(5, 8), rand(5, 8, seed=1), rand(5, 8, seed=2)
    cos = lambda a, b: float(a @ b / a.norm() / b.norm())
    expected = sum(max(0.0, cos(p[i], t[i]) - cos(p[i], c[i]) + 0.2) for i in range(5)) / 5
    assert xmkd.triplet_loss(p, t, c, 0.2).item() == pytest.approx(expected, rel=1e-5)


def test_filter_agrees_with_its_equations_written_out():
    B, K, D = 3, 5, 8
    f = xmkd.ModalityNoiseFilter(4, dim=D, heads=2).eval()
    t, S = rand(B, D), rand(B, K, D, seed=1)
    out = f(t, S)
    (w1, bn, _, w2), state = f.gated_feature_composer, f.attn.state_dict()
    hidden = torch.relu(bn(torch.cat([t, S.sum(1) / K], 1) @ w1.weight.T + w1.bias))
    gate = 1 / (1 + torch.exp(-(hidden @ w2.weight.T + w2.bias)))
    assert torch.allclose(out.gate, gate, atol=1e-6) and torch.allclose(out.teacher, gate * t, atol=1e-6)
    wq, wk, wv = state["in_proj_weight"].split(D)
    bq, bk, bv = state["in_proj_bias"].split(D)
    for b in range(B):
        heads, weights = [], torch.zeros(K)
        for h in (slice(0, D // 2), slice(D // 2, D)):
            q, k, v = (gate[b] * t[b] @ wq.T + bq)[h], (S[b] @ wk.T + bk)[:, h], (S[b] @ wv.T + bv)[:, h]
            attention = torch.softmax(k @ q / math.sqrt(D // 2), 0)
            weights += attention / 2
            heads.append(attention @ v)
        selected = torch.cat(heads) @ state["out_proj.weight"].T + state["out_proj.bias"]
        assert torch.allclose(out.attention[b], weights, atol=1e-6)
        assert torch.allclose(out.evidence[b], f.trans_sv(selected[None])[0], atol=1e-5)
    assert torch.allclose(out.logits, f.sv_cls_classifier(out.evidence))


def small(tags=False, teacher_dim=32, kind="video"):
    """A student of D = 32, its filter, optimiser and one batch."""
    torch.manual_seed(0)
    student = xmkd.make_network(kind, 5, 4).double()
    noise_filter = xmkd.ModalityNoiseFilter(5, 32, teacher_dim=teacher_dim).double()
    inputs = rand(4, 3, 4, 16, 16).double() if kind == "video" else rand(4, 48, 64).double()
    labels = (rand(4, 5, seed=5) > 0.5).float() if tags else torch.tensor([0, 1, 1, 4])
    return student, noise_filter, inputs, rand(4, teacher_dim, seed=6).double(), labels


def test_filter_loss_trains_the_filter_only_and_equals_two_full_backward_passes():
    results = []
    for full in (False, True):
        student, noise_filter, inputs, teacher, labels = small()
        optimizer = torch.optim.SGD([*student.parameters(), *noise_filter.parameters()], lr=0.1)
        if not full:
            terms = xmkd.train_step(student, noise_filter, optimizer, inputs, teacher, labels)
            assert list(terms) == ["cls", "csc", "filter_cls", "sparsity", "triplet"] and not any(t.requires_grad for t in terms.values())
        else:                                                       # the released order of calls: METHOD, section 5
            student.train(), noise_filter.train()
            f = student(inputs)
            g = noise_filter(teacher, f.map)
            filter_loss = (F.cross_entropy(g.logits, labels) + 1e-3 * noise_filter.gated_feature_composer[3].weight.abs().sum(1).mean()
                           + xmkd.triplet_loss(f.pooled, teacher, g.teacher, 0.2))
            filter_loss.backward(retain_graph=True)
            student.zero_grad()
            similarity = xmkd.cosine_matrix(f.pooled, g.teacher).detach()
            (F.cross_entropy(f.logits, labels) + xmkd.csc_loss(f.pooled, g.evidence, similarity, labels)).backward()
            optimizer.step()
        results.append([p.detach().clone() for p in [*student.parameters(), *noise_filter.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("kind, tags, teacher_dim", [("video", False, 32), ("audio", True, 32), ("audio", True, 20)])
@pytest.mark.parametrize("method", xmkd.METHODS)
def test_each_method_trains_what_it_should(kind, tags, teacher_dim, method):
    student, helper, inputs, teacher, labels = small(tags, teacher_dim, kind)
    if method not in ("mnf", "xmkd"):
        probe = xmkd.linear_probe(teacher.float(), labels, 5).double() if method == "kd" else None
        helper = None if method == "student" else xmkd.Distiller(method, 5, 32, teacher_dim, probe=probe).double()
    before = [p.detach().clone() for p in student.parameters()]
    terms = xmkd.train_step(student, helper, xmkd.make_optimizer(student, helper), inputs, teacher, labels, calibrate=method != "mnf")
    names = {"student": {"cls"}, "mnf": {"cls", "csc", "filter_cls", "sparsity", "triplet"}}
    assert set(terms) == {**names, "xmkd": names["mnf"]}.get(method, {"cls", "distill"}) and all(t.isfinite() for t in terms.values())
    assert all(not torch.equal(a, b) for a, b in zip(before, student.parameters()))
    if helper is not None:                                              # the probe of kd stays, all else learns
        assert all((p.grad is None) == (method == "kd") for p in helper.parameters())


def test_compared_losses_agree_with_loops():
    s, t, labels = rand(5, 4, seed=1) * 3, rand(5, 4, seed=2) * 3, torch.tensor([0, 1, 0, 2, 1])
    tags = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    kl = tag_kl = contrast = 0.0
    for i in range(5):
        p, q = ([math.exp(v / 4) / sum(math.exp(u / 4) for u in x[i].tolist()) for v in x[i].tolist()] for x in (t, s))
        kl += 16 * sum(a * math.log(a / b) for a, b in zip(p, q)) / 5
        for a, b in zip(t[i].tolist(), s[i].tolist()):
            a, b = 1 / (1 + math.exp(-a / 4)), 1 / (1 + math.exp(-b / 4))
            tag_kl += 16 * (a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))) / 5
        cos = lambda i, j: float(F.cosine_similarity(s[i], t[j], dim=0)) / 0.07
        others = [j for j in range(5) if labels[j] != labels[i] or j == i]
        for forward in (True, False):
            z = {j: cos(i, j) if forward else cos(j, i) for j in others}
            contrast += (math.log(sum(map(math.exp, z.values()))) - z[i]) / 5
    assert xmkd.kd_loss(s, t, labels).item() == pytest.approx(kl, rel=1e-5)
    assert xmkd.kd_loss(s, t, tags).item() == pytest.approx(tag_kl, rel=1e-5)
    assert xmkd.crd_loss(s, t, labels).item() == pytest.approx(contrast, rel=1e-5)
    assert xmkd.crd_loss(s, t, torch.zeros(5, dtype=torch.long)).item() == 0          # no clip of another class: nothing to tell apart
    values = t.flatten().tolist()
    variance = sum((v - sum(values) / 20) ** 2 for v in values) / 19
    assert xmkd.fitnet_loss(s, t).item() == pytest.approx(sum((a - b) ** 2 for a, b in zip(s.flatten().tolist(), values)) / 20 / variance, rel=1e-5)


def test_compositional_loss_agrees_with_its_parts():
    torch.manual_seed(0)
    compose, classify, labels = torch.nn.Linear(8, 4), torch.nn.Linear(4, 3), torch.tensor([0, 1, 0, 2, 1])
    pooled, teacher, logits = (rand(5, n, seed=n).requires_grad_() for n in (4, 4, 3))
    teacher = (teacher.detach() * 2)
    loss = xmkd.ccl_loss(xmkd.Features(pooled[:, None], pooled, logits), teacher, labels, compose, classify)
    unit = lambda x: x / x.norm(dim=1, keepdim=True)
    joint = teacher + torch.cat([unit(teacher), unit(pooled)], 1) @ compose.weight.T + compose.bias
    total, p, q = F.cross_entropy(classify(joint), labels), logits.softmax(1), classify(joint).softmax(1)
    total = total + 0.5 * ((p - q) * (p / q).log()).sum(1).mean()
    def contrast(a, b):
        probabilities = [(unit(x) @ unit(y).T / 0.5).softmax(1) for x, y in ((a, b), (b, a))]
        return -sum(prob[i, labels == labels[i]].log().mean() for prob in probabilities for i in range(5)) / 5
    total = total + contrast(joint, teacher) + contrast(pooled, teacher) + contrast(pooled, joint)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    loss.backward(retain_graph=True)
    ours = pooled.grad.clone()
    pooled.grad = None
    (total - F.cross_entropy(classify(joint), labels) - contrast(joint, teacher)).backward()
    assert torch.allclose(ours, pooled.grad, atol=1e-6)                 # the composition's own terms do not reach the student
    assert compose.weight.grad.abs().sum() > 0 and classify.weight.grad.abs().sum() > 0


def test_linear_probe_separates_what_is_separable_and_stays_small_on_noise():
    embeddings, labels = rand(60, 8, seed=1), torch.arange(60) % 3
    embeddings[torch.arange(60), labels] += 1.0
    probe = xmkd.linear_probe(embeddings, labels, 3)
    assert (probe(embeddings).argmax(1) == labels).float().mean() > 0.95 and not probe.weight.requires_grad
    noise = xmkd.linear_probe(rand(60, 8, seed=2), labels, 3, decay=100.0)
    assert noise.weight.abs().max() < 0.05


def test_optimizer_has_the_authors_settings():
    student, noise_filter, *_ = small()
    groups = xmkd.make_optimizer(student, noise_filter).param_groups
    assert [(round(g["lr"], 8), g["weight_decay"]) for g in groups] == [(3e-4, 5e-4), (6e-5, 5e-4)]


# ------------------------------------------------------------------------------------------------ parity (reference numbers)
@pytest.fixture(scope="module")
def formula():
    spec = importlib.util.spec_from_file_location("formula_weights", TESTDATA / "parity" / "formula_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def filled(formula, network, salt, **more):
    arrays = formula.fill([(k, tuple(v.shape)) for k, v in network.state_dict().items()], salt, **more)
    network.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in arrays.items()})
    return network


def numbers(name):
    return np.load(TESTDATA / "parity" / "open" / f"{name}.npz")


def close(ours, theirs, atol, rtol=0.0):
    np.testing.assert_allclose(np.asarray(ours.detach() if isinstance(ours, torch.Tensor) else ours), theirs, atol=atol, rtol=rtol)


@needs_testdata
def test_video_student_agrees_with_the_authors(formula):
    z, net = numbers("video"), filled(formula, xmkd.VideoNet(51), "open/video")
    keys = json.loads((TESTDATA / "parity" / "authors_keys.json").read_text())
    assert [[k, list(v.shape)] for k, v in net.state_dict().items()] == [row[:2] for row in keys["state_dict"]]
    out = net.eval()(torch.from_numpy(formula.normal("video_eval", (2, 3, 16, 112, 112), "open")))
    close(out.map[:, z["eval_map_row_ids"]], z["eval_map_rows"], 5e-5)
    close(out.pooled, z["eval_feature"], 1e-5), close(out.logits, z["eval_logits"], 1e-5)
    out = net.train()(torch.from_numpy(formula.normal("video_train", (4, 3, 8, 56, 56), "open")))
    close(out.logits, z["train_logits"], 5e-5)
    (out.logits ** 2).sum().backward()
    norms = {name: p.grad.norm().item() for name, p in net.named_parameters()}
    close([norms[str(n)] for n in z["train_grad_names"]], z["train_grad_l2"], 0, rtol=1e-3)


@needs_testdata
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_noise_filter_agrees_with_the_authors(formula, mode):
    z, net = numbers("mnf"), filled(formula, xmkd.ModalityNoiseFilter(51), "open/mnf").train(mode == "train")
    t = torch.from_numpy(formula.relu_features("mnf_teacher", (6, 512), "open")).requires_grad_()
    m = torch.from_numpy(formula.relu_features("mnf_map", (6, 98, 512), "open")).requires_grad_()
    out = net(t, m)
    for ours, name in zip(out, ("selected_audio_feature", "selected_video_feature", "pred", "gate")):
        close(ours, z[f"{mode}_{name}"], 1e-4 if mode == "train" else 1e-5)
    close(out.attention, z[f"{mode}_attn"][:, 0], 1e-5)
    if mode == "train":
        (out.logits ** 2).sum().backward()
        close(t.grad, z["train_grad_teacher"], 1e-4), close(m.grad[:, [0, 50, 97]], z["train_grad_map_rows"], 1e-4)


@needs_testdata
@pytest.mark.parametrize("kind, offset", [("adaptive", 0.07), ("adaptive", 0.2), ("constant", 0.07), ("constant", 0.2)])
def test_csc_and_triplet_agree_with_the_authors(kind, offset):
    z, key = numbers("csc"), f"{kind}_{str(offset).replace('.', 'p')}"
    p, e = (torch.from_numpy(z[name]).requires_grad_() for name in ("video", "selected_video"))
    similarity = torch.from_numpy(z["similarity"]) * (kind == "adaptive")
    loss = xmkd.csc_loss(p, e, similarity, torch.from_numpy(z["labels"]), offset)
    loss.backward()
    close(loss, z[f"loss_{key}"], 5e-6), close(p.grad, z[f"grad_video_{key}"], 1e-8, 1e-4), close(e.grad, z[f"grad_selected_{key}"], 1e-8, 1e-4)
    z = numbers("triplet")
    a, n, p = (torch.from_numpy(z[f"triplet_{name}"]).requires_grad_() for name in ("anchor", "negative", "positive"))
    loss = xmkd.triplet_loss(a, n, p, 0.2)
    loss.backward()
    close(loss, z["triplet_loss_margin_0p2"], 1e-6), close(p.grad, z["triplet_grad_positive"], 1e-8, 1e-4)
    close(xmkd.triplet_loss(a, n, p, 0.0), z["triplet_loss_margin_0p0"], 1e-6)


@needs_testdata
@pytest.mark.parametrize("variant, options", [("full", {}), ("threshold_0p2", {"offset": 0.2}), ("no_norm_no_triplet", {"sparsity": 0, "margin": -1}),
                                              ("constant_temperature", {"offset": float(np.float32(0.07)), "calibrate": False})])
def test_steps_of_the_whole_recipe_agree_with_the_authors_in_float64(formula, variant, options):
    z = numbers("trajectory")
    student = filled(formula, xmkd.VideoNet(51), "open/video").double()
    noise_filter = filled(formula, xmkd.ModalityNoiseFilter(51), "open/mnf").double()
    optimizer = xmkd.make_optimizer(student, noise_filter)
    for i in range(5 if variant == "full" else 2):
        terms = xmkd.train_step(student, noise_filter, optimizer, torch.from_numpy(formula.normal(f"traj_clip_{i}", (6, 3, 8, 56, 56), "open")).double(),
                                torch.from_numpy(formula.relu_features(f"traj_teacher_{i}", (6, 512), "open")).double(), torch.from_numpy(z[f"labels_{i}"]), **options)
        close([float(terms[k]) for k in ("cls", "filter_cls", "csc", "sparsity", "triplet")], z[f"{variant}__f64__losses"][i], 1e-9)


@needs_testdata
def test_audio_networks_agree_with_panns(formula):
    z = numbers("panns")
    logmel = xmkd.LogMel()(torch.from_numpy(formula.waveform("panns_wave", 2, 64000, 32000, "open")))
    close(logmel, z["logmel"], 1e-3)
    for name, stages in (("cnn10", 4), ("cnn14_emb512", 6)):
        net = filled(formula, xmkd.AudioNet(527, stages=stages), f"open/{name}", front_bn="bn0").eval()
        with torch.no_grad():
            out = net(torch.from_numpy(z["logmel"]))
        close(out.pooled, z[f"{name}_embedding"], 2e-5), close(out.logits.sigmoid(), z[f"{name}_clipwise_output"], 5e-6)


@needs_testdata
def test_windows_and_retrieval_agree_with_the_authors():
    for n, lists in json.loads((TESTDATA / "parity" / "temporal_sampling.json").read_text()).items():
        if n.isdigit():
            assert xmkd.even_windows(int(n)) == lists["TemporalEvenCrop(16,3)"] and xmkd.sliding_windows(int(n)) == lists["SlidingWindow(16,16)"]
    z = numbers("retrieval")
    for prefix in ("", "weak_"):
        data = [torch.from_numpy(z[prefix + name]) for name in ("val_features", "train_features", "val_labels", "train_labels")]
        ours = xmkd.retrieval_metrics(*data, ks=z[prefix + "hit_k"].tolist())
        close([ours[f"R@{k}"] for k in z[prefix + "hit_k"]], z[prefix + "hit_rate"], 1e-9)
        close([xmkd.retrieval_metrics(*data, topk=int(k))["mAP_released"] for k in z[prefix + "map_k"]], z[prefix + "map"], 1e-9)


# ------------------------------------------------------------------------------------------------ 2. networks
def test_networks_return_map_pooled_and_logits():
    out = xmkd.VideoNet(7, width=8)(rand(2, 3, 16, 32, 48))
    assert [tuple(x.shape) for x in out] == [(2, 2 * 2 * 3, 64), (2, 64), (2, 7)] and torch.allclose(out.map.mean(1), out.pooled)
    out = xmkd.AudioNet(7, width=8, dim=64)(rand(2, 101, 64) * 50 - 80)
    assert [tuple(x.shape) for x in out] == [(2, 6 * 4, 64), (2, 64), (2, 7)] and (out.pooled >= 0).all()
    assert xmkd.AudioNet(3, width=4, stages=6, dim=20)(rand(2, 101, 64)).map.shape == (2, 3 * 2, 128)


def test_logmel_agrees_with_its_description_written_out():
    x = (rand(2, 6400) - 0.5).double().numpy()
    x[1] = 0                                                              # silence sits on the floor of -100 dB
    x[0] += np.sin(2 * np.pi * 1000 * np.arange(6400) / 32000)
    hz = lambda mel: mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)                  # Slaney's scale
    mel = lambda f: f * 3 / 200 if f < 1000 else 15 + 27 * math.log(f / 1000) / math.log(6.4)
    edges = [hz(m) for m in np.linspace(mel(50), mel(14000), 66)]
    bins = np.arange(513) * 32000 / 1024
    triangles = np.stack([np.maximum(0, np.minimum((bins - a) / (b - a), (c - bins) / (c - b))) * 2 / (c - a)
                          for a, b, c in zip(edges, edges[1:], edges[2:])])
    padded, window = np.pad(x, ((0, 0), (512, 512)), mode="reflect"), 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    frames = np.stack([padded[:, 320 * t:320 * t + 1024] * window for t in range(21)], 1)
    expected = 10 * np.log10(np.maximum(np.abs(np.fft.rfft(frames)) ** 2 @ triangles.T, 1e-10))
    close(xmkd.LogMel()(torch.from_numpy(x).float()), expected, 2e-3)


def test_spec_augment_masks_training_views_only():
    prepare, sound = xmkd.Prepare(spec_augment=True), (rand(2, 32000) * 2000).to(torch.int16)
    clean = prepare.eval()(sound)
    masked = prepare.train()(sound)
    assert torch.equal(clean, xmkd.LogMel()(sound.float() / 32767)) and 0 < (masked - clean).abs().gt(1e-3).float().mean() < 0.7


# ------------------------------------------------------------------------------------------------ 3. media
def encode(path, seconds=2.0, fps=10, rate=16000, video=True, audio=True, tone=440.0, size=(48, 64), audio_seconds=None, every=1):
    """A clip whose frame k is grey 5 * k and whose sound is one tone; the container follows the extension."""
    with av.open(str(path), "w") as container:
        codecs = {".avi": ("mpeg4", "mp3"), ".webm": ("libvpx-vp9", "libopus"), ".mp3": (None, "mp3"), ".wav": (None, "pcm_s16le"), ".flac": (None, "flac")}
        v, a = codecs.get(Path(path).suffix, ("libx264", "aac"))
        vs = container.add_stream(v, rate=fps) if video and v else None
        as_ = container.add_stream(a, rate=rate, layout="mono") if audio and a else None
        if vs:
            vs.height, vs.width, vs.pix_fmt = *size, "yuv420p"
            for k in range(0, round(seconds * fps), every):
                frame = av.VideoFrame.from_ndarray(np.full((*size, 3), min(5 * k, 255), np.uint8), format="rgb24")
                frame.pts = k
                container.mux(vs.encode(frame))
            container.mux(vs.encode(None))
        if as_:
            wave = (0.5 * np.sin(2 * np.pi * tone * np.arange(round((audio_seconds or seconds) * rate)) / rate) * 32767).astype(np.int16)
            for at in range(0, len(wave), 1024):
                frame = av.AudioFrame.from_ndarray(wave[None, at:at + 1024], format="s16", layout="mono")
                frame.sample_rate, frame.pts = rate, at
                container.mux(as_.encode(frame))
            container.mux(as_.encode(None))
    return str(path)


@pytest.mark.parametrize("name", ["a.wav", "a b.mp4", "-a.mkv", "a.avi", "a.flac"])
def test_decode_audio_gives_the_asked_range_as_mono_32_khz(tmp_path, name):
    path = encode(tmp_path / name, seconds=3.0, rate=22050 if name == "a.avi" else 16000)
    whole, part = xmkd.decode_audio(path), xmkd.decode_audio(path, 1.0, 2.0)
    assert whole.dtype == torch.float32 and whole.ndim == 1 and abs(len(whole) - 96000) < 5000 and len(part) == 32000
    assert torch.fft.rfft(part * torch.hann_window(32000)).abs().argmax().item() == 440       # bins are 1 Hz wide
    assert 0.4 < part.abs().max() < 0.6


def test_gzipped_sound_decodes_and_empty_ranges_do_not(tmp_path):
    wav, mp3 = encode(tmp_path / "a.wav"), encode(tmp_path / "a.mp3")
    (tmp_path / "b.wav.gz").write_bytes(gzip.compress(Path(wav).read_bytes()))
    assert torch.equal(xmkd.decode_audio(tmp_path / "b.wav.gz"), xmkd.decode_audio(wav))
    packed = gzip.compress(Path(wav).read_bytes())
    (tmp_path / "c.wav.gz").write_bytes(packed[:len(packed) // 3])
    for call, reason in ((lambda: xmkd.decode_audio(tmp_path / "c.wav.gz"), "truncated|cannot be decoded"), (lambda: xmkd.decode_audio(mp3, 50, 60), "no audio between 50 and 60 s")):
        with pytest.raises(xmkd.InputError, match=reason):
            call()


def test_streams_of_unequal_length_are_not_truncated_files(tmp_path):
    path = encode(tmp_path / "a.mkv", seconds=4.0, audio_seconds=2.0)
    assert len(xmkd.decode_audio(path)) == pytest.approx(64000, abs=3000) and len(xmkd.decode_video(path)) == 16
    still = encode(tmp_path / "still.mp4", seconds=3.0, every=20)                    # frames at 0 and 2 s only
    assert len(xmkd.decode_video(still, 0.0, 1.5)) == 6


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_decode_video_shows_the_frame_of_each_moment(tmp_path, name):
    path = encode(tmp_path / name, seconds=3.0)                                      # frame k, at k / 10 s, is grey 5 k
    late = 5 if name == "a.avi" else 0                   # FFmpeg's avi writer leaves frame 1 out and shows the rest 0.1 s later
    frames = xmkd.decode_video(path, fps=4.0, size=(24, 40))
    assert frames.shape == (13 if late else 12, 3, 24, 40) and frames.dtype == torch.uint8
    expected = torch.tensor([max(5.0 * math.floor(k / 4 * 10 + 1e-6) - late, 0) for k in range(len(frames))])
    assert (frames.float().mean((1, 2, 3)) - expected).abs().max() <= 4
    part = xmkd.decode_video(path, 1.0, 2.0, fps=10.0)
    assert part.shape == (10, 3, 128, 171) and (part.float().mean((1, 2, 3)) - torch.arange(50.0, 100, 5) + late).abs().max() <= 4
    assert xmkd.decode_video(path, 0, 1, size=24).shape == (4, 3, 24, 32)            # shorter side, aspect ratio kept


def test_unusable_files_say_why(tmp_path):
    good = Path(encode(tmp_path / "good.avi", seconds=4.0)).read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("<html>not found</html>")
    (tmp_path / "cut.avi").write_bytes(good[:len(good) // 2])
    (tmp_path / "cut.wav").write_bytes(Path(encode(tmp_path / "good.wav")).read_bytes()[:20000])
    mp4 = Path(encode(tmp_path / "good.mp4")).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(mp4[:len(mp4) // 2])
    (tmp_path / "folder.mp4").mkdir()
    silent, blind = encode(tmp_path / "silent.mp4", audio=False), encode(tmp_path / "blind.mp4", video=False)
    for call, reason in ((lambda: xmkd.decode_audio(tmp_path / "empty.mp4"), "empty file"),
                         (lambda: xmkd.decode_video(tmp_path / "text.mp4"), "cannot be decoded"),
                         (lambda: xmkd.decode_video(tmp_path / "cut.mp4"), "cannot be decoded"),
                         (lambda: xmkd.decode_video(tmp_path / "cut.avi"), "truncated"),
                         (lambda: xmkd.decode_audio(tmp_path / "cut.avi"), "truncated"),
                         (lambda: xmkd.decode_audio(tmp_path / "folder.mp4"), "not a regular file"),
                         (lambda: xmkd.decode_audio(tmp_path / "none.mp4"), "no such file"),
                         (lambda: xmkd.decode_audio(silent), "no audio stream"), (lambda: xmkd.decode_video(blind), "no video stream"),
                         (lambda: xmkd.decode_audio(silent[:-10] + "good.wav", 9.0, 10.0), "no audio between 9 and 10 s")):
        with pytest.raises(xmkd.InputError, match=reason):
            call()


def test_decoding_leaves_no_file_open(tmp_path):
    path = encode(tmp_path / "a.mp4")
    (tmp_path / "bad.mp4").write_text("x" * 100)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        xmkd.decode_audio(path, 0, 0.5), xmkd.decode_video(path, 0, 0.5)
        with pytest.raises(xmkd.InputError):
            xmkd.decode_audio(tmp_path / "bad.mp4")
    assert len(os.listdir("/proc/self/fd")) == before


def refusal(path, kind, *times, **more):
    """"" where the file decodes to what is promised, else the reason, which must begin with the path."""
    try:
        clip = (xmkd.decode_audio if kind == "audio" else xmkd.decode_video)(path, *times, **more)
    except xmkd.InputError as error:
        assert str(error).startswith(f"{os.fspath(path)}: ") and len(str(error)) > len(os.fspath(path)) + 5
        return str(error)[len(os.fspath(path)) + 2:]
    assert len(clip) and (not times or len(clip) <= math.ceil((times[1] - times[0]) * (32000 if kind == "audio" else 4)))
    if kind == "audio":
        assert clip.dtype == torch.float32 and clip.ndim == 1 and clip.isfinite().all()
    else:
        assert clip.dtype == torch.uint8 and clip.ndim == 4 and clip.shape[1:] == (3, *more.get("size", (128, 171)))
    return ""


def in_time(seconds, code, *arguments):
    """Runs code in a process of its own, so that what hangs there cannot hang the tests."""
    done = subprocess.run([sys.executable, "-c", f"import test_xmkd as t, xmkd, sys\n{code}", *map(os.fspath, arguments)], cwd=HERE, timeout=seconds, capture_output=True, text=True,
                          errors="surrogateescape")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def pictures(path, times, size=(32, 32), codec="mjpeg", pix="yuvj420p", unit=Fraction(1, 1000)):
    """A video without sound whose frames are shown at these milliseconds, or at other units of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *size, pix
        stream.time_base = stream.codec_context.time_base = unit
        for at in times:
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 99, np.uint8), format="rgb24").reformat(format=pix)
            frame.pts, frame.time_base = at, unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def sound(path, samples, rate, channels=1, bits=16):
    """A .wav written out by hand: 16 or 24 bits are whole numbers, 32 are floats."""
    data, block = np.ascontiguousarray(samples).tobytes(), channels * bits // 8
    head = struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVEfmt ", 16, 3 if bits == 32 else 1, channels, rate, rate * block, block, bits, b"data", len(data))
    path.write_bytes(head + data)
    return path


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv", "a.wav"])
def test_a_file_cut_anywhere_is_refused_or_whole(tmp_path, name):
    whole = Path(encode(tmp_path / name, seconds=4.0)).read_bytes()
    for share in (0.1, 0.5, 0.9):
        path = tmp_path / f"{share}{name}"
        path.write_bytes(whole[:int(share * len(whole))])
        for kind in ("audio", "video"):
            reason = refusal(path, kind)
            shorter = share == 0.9 or (name, kind) == ("a.wav", "audio")                # FFmpeg takes a WAV to end where it is cut
            assert re.match("truncated|cannot be decoded|no (audio|video)", reason) or (shorter and reason == ""), (name, share, kind, reason)


@pytest.mark.parametrize("seconds", [0.1, 0.4, 1.3, 2.0])
def test_frames_are_as_many_as_promised_and_a_single_one_is_a_clip(tmp_path, seconds):
    path = encode(tmp_path / "a.mp4", seconds=seconds)
    for fps in (1.0, 4.0, 7.5, 30.0):
        assert len(xmkd.decode_video(path, fps=fps)) == math.ceil(seconds * fps - 1e-6)
    assert abs(len(xmkd.decode_audio(path)) - 32000 * seconds) < 3000


@pytest.mark.parametrize("size", [(1, 1), (3, 4097), (4097, 3)])
def test_odd_pictures_keep_the_promised_shape(tmp_path, size):
    path = pictures(tmp_path / "a.mkv", [0, 100, 200], size, "ffv1", "bgr0")
    assert refusal(path, "video") == "" and min(xmkd.decode_video(path, size=24).shape[2:]) == 24
    one, other = pictures(tmp_path / "1.mjpeg", [0, 40]), pictures(tmp_path / "2.mjpeg", [0, 40], (32, 96))
    both = tmp_path / "both.mjpeg"                                       # the picture changes its shape in mid-stream
    both.write_bytes(one.read_bytes() + other.read_bytes())
    assert xmkd.decode_video(both, fps=25.0, size=24).shape == (4, 3, 24, 24)


@pytest.mark.parametrize("rate, channels, bits", [(8000, 1, 16), (96000, 1, 16), (48000, 6, 16), (48000, 6, 24), (44100, 3, 24), (384000, 2, 32)])
def test_odd_sound_becomes_mono_at_32_khz(tmp_path, rate, channels, bits):
    values = rand(rate * channels * (3 if bits == 24 else 1)).numpy()
    path = sound(tmp_path / "a.wav", {16: values * 9999, 24: values * 255, 32: values}[bits].astype({16: np.int16, 24: np.uint8, 32: np.float32}[bits]), rate, channels, bits)
    assert refusal(path, "audio") == "" and len(xmkd.decode_audio(path)) == pytest.approx(32000, abs=200)


def test_sound_that_is_not_finite_or_endless_is_refused(tmp_path):
    values = np.full(16000, 0.5, np.float32)
    for value in (np.nan, np.inf):
        values[8000] = value
        assert "infinite, or none at all" in refusal(sound(tmp_path / "a.wav", values, 16000, bits=32), "audio")
    with av.open(str(tmp_path / "far.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        for pts in (0, 8000 * 10**6):                                    # 11 days later
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 8000, pts
            container.mux(stream.encode(frame))
    assert "cut it into clips" in refusal(tmp_path / "far.mkv", "audio")


def test_timestamps_that_vary_start_late_jump_or_go_back(tmp_path):
    assert len(xmkd.decode_video(pictures(tmp_path / "vfr.mkv", [0, 10, 20, 500, 900, 901, 1500, 2500]))) in (11, 12)
    for name in ("late.mkv", "late.mp4"):
        late = pictures(tmp_path / name, range(5000, 6000, 100), codec="libx264", pix="yuv420p")
        assert refusal(late, "video") == refusal(late, "video", 0.5, 0.9) == ""                          # counted from its first frame
    assert "cut it into clips" in refusal(pictures(tmp_path / "jump.mkv", [0, 100, 200, 10**9]), "video")
    assert refusal(tmp_path / "jump.mkv", "video", 0.0, 2.0) == "" and "no video between 1e+300 and" in refusal(tmp_path / "jump.mkv", "video", 1e300, 2e300)
    back = tmp_path / "back.mpg"
    back.write_bytes(pictures(tmp_path / "a.mpg", range(50), codec="mpeg2video", pix="yuv420p", unit=Fraction(1, 25)).read_bytes() * 2)
    assert refusal(back, "video") == "" or "truncated" in refusal(back, "video")
    whole = Path(encode(tmp_path / "tag.mkv")).read_bytes()
    (tmp_path / "tag.mkv").write_bytes(re.sub(rb"00:00:0\d\.\d{9}", b"soon after a while", whole))                              # no duration that can be read
    assert refusal(tmp_path / "tag.mkv", "video") == refusal(tmp_path / "tag.mkv", "audio") == ""


def test_sound_that_starts_after_the_picture_keeps_its_time(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        video, audio = container.add_stream("mjpeg", rate=10), container.add_stream("pcm_s16le", rate=8000, layout="mono")
        video.height, video.width, video.pix_fmt = 32, 32, "yuvj420p"
        for k in range(30):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            frame.pts = k
            container.mux(video.encode(frame))
        frame = av.AudioFrame.from_ndarray(np.full((1, 8000), 16384, np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 8000, 16000
        container.mux(audio.encode(frame))
    samples = xmkd.decode_audio(tmp_path / "a.mkv")
    assert len(samples) == pytest.approx(96000, abs=200) and samples[:63000].abs().max() == 0 and samples[70000:90000].min() > 0.4


def test_what_is_no_media_file_neither_hangs_nor_opens_another(tmp_path):
    """Playlists and session descriptions name files, addresses and ports; FFmpeg tells them by content, whatever they are called."""
    encode(tmp_path / "secret.wav")
    os.mkfifo(tmp_path / "fifo.mp4")
    os.symlink(tmp_path / "loop.mp4", tmp_path / "loop.mp4")
    os.symlink(tmp_path / "loop.mp4", tmp_path / "deadlink.mp4")
    (tmp_path / "sdp.mp4").write_text("v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=audio 5004 RTP/AVP 0\r\na=rtpmap:0 PCMU/8000\r\n")
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile secret.wav\n")
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{tmp_path}/secret.wav\n#EXT-X-ENDLIST\n")
    names = ["fifo.mp4", "loop.mp4", "deadlink.mp4", "sdp.mp4", "concat.mp4", "list.m3u8"]
    reasons = in_time(60, "[print(t.refusal(path, 'audio')) for path in sys.argv[1:]]", *(tmp_path / name for name in names)).splitlines()
    assert reasons[:3] == ["not a regular file", "no such file, or a link to none", "no such file, or a link to none"]
    assert len(reasons) == 6 and all(reason.startswith("cannot be decoded") for reason in reasons[3:]), reasons


@pytest.mark.parametrize("name", [b"a b.mp4", b"a\nb.mp4", b"\xff\xfe.mp4", b"n" * 196 + b".mp4", b"'\"$(x);.mp4"])
def test_names_of_any_kind_decode_and_are_named_in_reasons(tmp_path, name):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
    shutil.copy(encode(tmp_path / "good.mp4", seconds=0.5), path)
    assert refusal(path, "audio") == refusal(path, "video") == ""
    Path(path).write_bytes(b"<html>")
    assert "cannot be decoded" in refusal(path, "video")


def test_the_extension_does_not_matter(tmp_path):
    for name, other in (("a.mp4", "b.wav"), ("a.wav", "b.mp4"), ("a.mkv", "b.avi"), ("a.avi", "b.txt")):
        shutil.copy(encode(tmp_path / name), tmp_path / other)
        assert refusal(tmp_path / other, "audio") == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_says_so(tmp_path):
    path = encode(tmp_path / "a.mp4")
    os.chmod(path, 0)
    assert "Permission denied" in refusal(path, "audio")


def flip_bits(folder, seeds):
    """Decodes files with flipped bits, many everywhere or few in the header, by every entry; anything but InputError escapes."""
    folder = Path(folder)
    good = {name: Path(encode(folder / name)).read_bytes() for name in ("a.mp4", "a.mkv", "a.avi", "a.wav", "a.webm", "a.mp3", "a.flac", "a.ts")}
    for seed in seeds:
        for name, content in good.items():
            rng, data = np.random.default_rng([seed, *map(ord, name)]), np.frombuffer(content, np.uint8).copy()
            where = rng.integers(0, min(len(data), 1500), 6) if seed % 3 == 2 else rng.integers(0, len(data), max(1, len(data) // (100, 2000)[seed % 3]))
            data[where] ^= np.uint8(1) << rng.integers(0, 8, len(where)).astype(np.uint8)
            path = folder / f"flipped-{seed}{Path(name).suffix}"
            path.write_bytes(data)
            for kind, times in itertools.product(("audio", "video"), ((), (0.5, 1.5))):
                refusal(path, kind, *times)
            path.unlink()
    print(len(seeds) * len(good))


def test_flipped_bits_decode_or_are_refused(tmp_path):
    assert in_time(120, "t.flip_bits(sys.argv[1], range(6))", tmp_path).split() == ["48"]


@stress
def test_many_flipped_bits_decode_or_are_refused(tmp_path):
    assert in_time(600, "t.flip_bits(sys.argv[1], range(100, 280))", tmp_path).split() == ["1440"]


@stress
def test_two_thousand_opens_leak_neither_files_nor_memory(tmp_path):
    paths = [encode(tmp_path / name, seconds=0.3) for name in ("a.mp4", "a.mkv", "a.avi", "a.wav")]
    for k, path in enumerate(list(paths)):
        paths.append(str(tmp_path / f"cut{k}{Path(path).suffix}"))
        Path(paths[-1]).write_bytes(Path(path).read_bytes()[:3000])
    paths += [str(tmp_path / "text.mp4"), str(tmp_path / "none.mp4")]
    Path(paths[-2]).write_text("x" * 100)
    state = lambda: (len(os.listdir("/proc/self/fd")), int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20)      # MB that are held
    for k in range(2400):
        if k == 400:
            before = state()
        refusal(paths[k % len(paths)], ("audio", "video")[k // len(paths) % 2])
    after = state()
    assert after[0] == before[0] and after[1] < before[1] + 20, (before, after)


@needs_testdata
def test_real_clips_decode_in_every_codec():
    for name, facts in json.loads((TESTDATA / "clips" / "clips.json").read_text()).items():
        path = TESTDATA / "clips" / name
        if facts["n_samples"]:
            assert abs(len(xmkd.decode_audio(path)) / 32000 - facts["n_samples"] / facts["sample_rate"]) < 0.05
        if facts["n_frames"]:
            assert abs(len(xmkd.decode_video(path)) - facts["n_frames"] / facts["fps"] * 4) <= 1.5
    assert xmkd.decode_video(TESTDATA / "clips" / "nasa_13013_rotated.mp4", size=40).shape[2:] == (71, 40)      # turned upright


def load_one(clip, kind, **more):
    stream, = xmkd.load_streams(clip, [kind], **more)
    return stream


def jpeg_error(path, planes, **more):
    """Mean distance of the cached frames from those decoded, in levels of 255, and their bytes."""
    clip = xmkd.Clip("a", (0,), "train", None, str(path))
    frames = load_one(clip, "video", **more)
    packed = xmkd.pack_frames(load_one(clip, "video", planes=planes, **more))
    kept = xmkd.read_frames(packed, range(xmkd.stream_length(packed)))
    assert kept.shape == frames.shape and kept.dtype == torch.uint8 and b"\xff\xc4" not in packed.tobytes()      # no Huffman tables
    return (kept.float() - frames.float()).abs().mean().item(), packed.nbytes


@pytest.mark.parametrize("space", [0, 1, 2, 5, 6, 7, 9])
@pytest.mark.parametrize("pix", ["yuv420p", "yuvj420p", "yuv422p", "yuv444p", "yuv420p10le", "gray", "bgr0"])
def test_planes_give_jpeg_the_colours_that_rgb_would(pix, space):
    blocks = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).repeat(20, 0).repeat(20, 1).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(blocks, format="rgb24").reformat(format=pix)
    for value in (0, 1, 2):                                                        # the range: not told, TV, computer
        frame.colorspace, frame.color_range = space, value
        one, two = (xmkd.to_picture(frame, 64, xmkd.VideoReformatter(), xmkd.VideoReformatter(), planes) for planes in (False, True))
        rgb = torch.from_numpy(one.to_ndarray()).permute(2, 0, 1)[None]
        via_rgb, direct = ((xmkd.read_frames(xmkd.pack_frames(x), [0]) - rgb.float()).abs().mean() for x in (rgb, [two]))
        assert (two.height, two.width) == (64, 85) and direct <= via_rgb + 0.2


@pytest.mark.parametrize("space", [8, 10, 14])
def test_a_colour_matrix_that_cannot_be_converted_costs_its_clip_and_not_the_training(tmp_path, space):
    path = str(tmp_path / "odd.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = space, 2
        for k in range(6):
            frame = av.VideoFrame.from_ndarray(np.full((72, 64), 90, np.uint8), format="yuvj420p")
            frame.colorspace, frame.color_range, frame.pts = space, 2, k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(path) as container:
        assert next(container.decode(video=0)).colorspace == space
    store = xmkd.open_store("files", {**xmkd.DEFAULTS, "fps": 4.0}, tmp_path, [xmkd.Clip("a", (0,), "train", path, path)])
    (_, lengths, _, reason), = store.decode([(0, ["video"])], 0, lambda done, total: None)
    assert (lengths == [] and path in reason) or len(xmkd.read_frames(*store.streams(0, ["video"]), range(6))) == 6


@needs_testdata
def test_the_cache_of_real_clips_is_as_close_and_hardly_larger_without_rgb_between():
    for path in [*sorted((TESTDATA / "clips").glob("*.[ma]*[v4mg]")), next((TESTDATA / "avdigits").rglob("*.avi"))]:
        with av.open(str(path)) as container:
            if not container.streams.video:
                continue
        (via_rgb, large), (direct, small) = (jpeg_error(path, planes, size=64) for planes in (False, True))
        assert direct <= via_rgb + 0.01 and small < 1.1 * large, path


def test_turned_doubled_and_changing_pictures_are_cached_in_shape(tmp_path):
    one, other = pictures(tmp_path / "1.mjpeg", [0, 40]), pictures(tmp_path / "2.mjpeg", [0, 40], (32, 96))
    both = tmp_path / "both.mjpeg"
    both.write_bytes(one.read_bytes() + other.read_bytes())
    assert jpeg_error(both, True, fps=100.0, size=24)[0] < 3                       # each picture several times over
    if TESTDATA.is_dir():
        assert jpeg_error(TESTDATA / "clips" / "nasa_13013_rotated.mp4", True, size=40)[0] < 3


# ------------------------------------------------------------------------------------------------ 4. data sets
def audioset(root, train=("aaaaaaaaaa0",), evaluation=("bbbbbbbbbb0",), files=None, labels='"/m/1,/m/2"'):
    """A tree with empty media files; `files` are their paths."""
    for name in files or [f"{i}.wav" for i in (*train, *evaluation)]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "class_labels_indices.csv").write_text('index,mid,display_name\n0,/m/1,"One, first"\n1,/m/2,"Two"\n')
    for name, ids in (("balanced_train_segments.csv", train), ("eval_segments.csv", evaluation)):
        rows = "".join(f"{i}, {30 * k}.000, {30 * k + 10}.000, {labels}\n" for k, i in enumerate(ids))
        (root / name).write_text("# Segments csv\n# num_ytids\n# YTID, start_seconds, end_seconds, positive_labels\n" + rows)
    return root


@pytest.mark.parametrize("name", ["audios/balanced_train_segments/Y{}.wav", "data/x/audio/{}_30000_40000.flac", "Music/{}_0.0-10.0.ogg", "wavs/000/id_{}.m4a",
                                  "Y{}_30.000_40.000.wav", "s/Y{}_30000.wav", "Dog/{}_30.wav", "{}_30.wav.gz", "clip/{}.p0.mp4", "{}.mkv", "v_{}.mp4", "v{}_0_10_out.mkv",
                                  "{}_40.000.mp4", "bal_train/{}.FLAC"])
@pytest.mark.parametrize("ytid", ["-a_b-c_d-e_", "_4gqARaEJE-", "Y1234567890", "v_-abcdefgh"])
def test_audioset_files_are_found_by_id_in_every_naming_scheme(tmp_path, name, ytid):
    clips, classes = xmkd.read_audioset(audioset(tmp_path, train=(ytid,), files=[name.format(ytid), "bbbbbbbbbb0.wav"]))
    assert classes == ["One, first", "Two"] and clips[0].id == ytid and clips[0].labels == (0, 1)
    assert clips[0].audio == str(tmp_path / name.format(ytid)) and (clips[0].video is None) == xmkd.is_sound_only(name)


def test_audioset_joins_sound_and_picture_and_reports_what_is_missing(tmp_path):
    root = audioset(tmp_path, train=("aaaaaaaaaa0", "aaaaaaaaaa1"), files=["audio/aaaaaaaaaa0_0_10.flac", "video/aaaaaaaaaa0_0_10.mp4", "x/aaaaaaaaaa0.flac", "bbbbbbbbbb0.mp4"])
    skipped = []
    clips, _ = xmkd.read_audioset(root, skipped=skipped)
    assert [(c.id, c.split, Path(c.audio).name, Path(c.video).name) for c in clips] == [
        ("aaaaaaaaaa0", "train", "aaaaaaaaaa0_0_10.flac", "aaaaaaaaaa0_0_10.mp4"), ("bbbbbbbbbb0", "eval", "bbbbbbbbbb0.mp4", "bbbbbbbbbb0.mp4")]
    assert skipped == [("aaaaaaaaaa1", "missing: listed, but no file has its name")]


@pytest.mark.parametrize("text", ["\ufeff# c\r\naaaaaaaaaa0, 0.000, 10.000, \"/m/1,/m/2\"\r\n\r\n", 'aaaaaaaaaa0,0,10,"""/m/1,/m/2""",,\n', "aaaaaaaaaa0, 0, 10, /m/2, /m/1,\n"])
def test_audioset_lists_mangled_by_editors_still_parse(tmp_path, text):
    root = audioset(tmp_path)
    (root / "balanced_train_segments.csv").write_text(text, encoding="utf-8")
    clips, _ = xmkd.read_audioset(root)
    assert clips[0][:3] == ("aaaaaaaaaa0", (0, 1), "train") and clips[0][5:7] == (0.0, 10.0)


@pytest.mark.parametrize("row, says", [("aaaaaaaaaa0, 0, 10, /m/9", "unknown label '/m/9'"), ("aaaaaaaaaa0, 10, 5, /m/1", "expected"), ("short, 0, 5, /m/1", "expected"),
                                       ("aaaaaaaaaa0, -1, 5, /m/1", "expected"), ("aaaaaaaaaa0, 0, 5", "expected")])
def test_audioset_list_errors_name_file_and_line(tmp_path, row, says):
    root = audioset(tmp_path)
    (root / "balanced_train_segments.csv").write_text("# c\n" + row + "\n")
    with pytest.raises(xmkd.InputError, match=rf"balanced_train_segments.csv:2: {says}"):
        xmkd.read_audioset(root)


def test_a_quote_that_is_never_closed_swallows_no_row_of_an_audioset_list(tmp_path):
    (tmp_path / "x.csv").write_text('"aaaaaaaaaa0, 0, 10, /m/1\naaaaaaaaaa1, 0, 10, "/m/1\naaaaaaaaaa2, 0, 10, "/m/1"\n')
    rows = [*xmkd.read_segments(str(tmp_path / "x.csv"), "train", {"/m/1": 0})]
    assert [(place[-2:], clip.id) for _, place, clip in rows] == [(f":{k + 1}", f"aaaaaaaaaa{k}") for k in range(3)]


@pytest.mark.parametrize("row, says", [
    ("aaaaaaaaaa0, nan, 10, /m/1\n", ":1: expected"), ("aaaaaaaaaa0, 0, 10, /m/1\n" + "x" * 10 ** 6, ":2: expected .{,500}mend"),
    ("aaaaaaaaaa0; 0; 10; /m/1\n", ":1: expected"), ("aaaaaaaaaa0, 0, inf, /m/1\n", ":1: expected"), ('aaaaaaaaaa0, 0, 10, "/m/1\n"\nshort, 0, 10, /m/1\n', ":3: expected")])
def test_audioset_lists_that_cannot_be_read_name_the_line_of_the_file(tmp_path, row, says):
    root = audioset(tmp_path)
    (root / "balanced_train_segments.csv").write_text(row)
    with pytest.raises(xmkd.InputError, match=f"balanced_train_segments.csv{says}"):
        xmkd.read_audioset(root)


@pytest.mark.parametrize("text, says", [
    ("index,mid,display_name,\r\n0,/m/1,One,\r\n,,,\r\n1,/m/2,Two,\r\n", ""), ("\ufeffindex,mid,display_name\n1,/m/2,Two\n0,/m/1,One\n", ""),
    ("index,mid,display_name\n0,/m/1,One\n1,/m/2\n", ":3: expected"), ("index,mid,display_name\n0,/m/1,One\nx,/m/2,Two\n", ":3: expected"), ("mid,name\n/m/1,One\n", ":2: expected")])
def test_class_labels_mangled_by_editors_parse_or_name_the_line(tmp_path, text, says):
    root = audioset(tmp_path)
    (root / "class_labels_indices.csv").write_bytes(text.encode())
    if not says:
        assert xmkd.read_audioset(root)[1] == ["One", "Two"]
        return
    with pytest.raises(xmkd.InputError, match=f"class_labels_indices.csv{says}"):
        xmkd.read_audioset(root)


def ucf101(root, train, evaluation=b"Typing/v_Typing_g01_c01.avi\n"):
    """UCF-101 with one class, whose file of the evaluation list is there."""
    (root / "ucfTrainTestlist").mkdir()
    for name, text in (("classInd.txt", b"95 Typing\n"), ("trainlist01.txt", train), ("testlist01.txt", evaluation)):
        (root / "ucfTrainTestlist" / name).write_bytes(text)
    for name in ("v_Typing_g01_c01.avi", "v_Typing_g08_c01.avi"):
        (root / name).touch()
    return root


def test_clips_listed_twice_count_once_and_are_reported(tmp_path):
    row, (skipped, others, thirds) = b"Typing/v_Typing_g01_c01.avi 95\n", ([], [], [])
    clips, _ = xmkd.read_ucf101(ucf101(tmp_path, row + row), skipped=skipped)
    assert [c.split for c in clips] == ["train"] and [reason for _, reason in skipped] == ["listed twice; the first row counts"] * 2
    (tmp_path / "vggsound.csv").write_text("aaaaaaaaaa0,30,dog,train\naaaaaaaaaa0,30,cat,test\n")
    (tmp_path / "aaaaaaaaaa0_000030.mp4").touch()
    clips, classes = xmkd.read_vggsound(tmp_path, others)
    assert [c.split for c in clips] == ["train"] and classes == ["dog"] and others == [(f"aaaaaaaaaa0_000030 ({tmp_path}/vggsound.csv:2)", "listed twice; the first row counts")]
    (tmp_path / "a").mkdir()
    root = audioset(tmp_path / "a", train=("aaaaaaaaaa0", "aaaaaaaaaa0"))
    clips, _ = xmkd.read_audioset(root, skipped=thirds)
    assert len(clips) == 2 and clips[0].start == 0 and "listed twice" in thirds[0][1]


@pytest.mark.parametrize("train", [b"\xff\xfeT\x00y\x00\n\x00", bytes(range(256)), b"v_Typing_g08_c01.avi\n", b'"Typing/v_Typing_g08_c01.avi 95"\r\n', b"../../etc/x.avi 1\n"])
def test_ucf101_rows_that_say_nothing_are_reported(tmp_path, train):
    clips, _ = xmkd.read_ucf101(ucf101(tmp_path, train), skipped=(skipped := []))
    assert [c.split for c in clips] == ["eval"] and skipped and all("class" in reason for _, reason in skipped)


def annotated(root, text):
    (root / "activity_net.v1-3.min.json").write_text(text if isinstance(text, str) else json.dumps(
        {"database": {"aaaaaaaaaa0": {"subset": "training", "annotations": [{"label": "x", "segment": text}]}}}), encoding="utf-8")
    (root / "v_aaaaaaaaaa0.mp4").touch()
    return root


@pytest.mark.parametrize("content", [[-1, 2], [3, 2], [2, 2], [math.nan, 2], [1, math.inf]])
def test_annotated_segments_that_are_no_time_name_file_and_clip(tmp_path, content):
    with pytest.raises(xmkd.InputError, match="activity_net.v1-3.min.json: .*v_aaaaaaaaaa0_0: segment .* needs 0 <= start < end"):
        xmkd.read_annotations(annotated(tmp_path, content))


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"database": [1]}', [1, 2, 3], "\0", [1, None]])
def test_annotations_that_are_none_name_the_file(tmp_path, content):
    with pytest.raises(xmkd.InputError, match="activity_net.v1-3.min.json: expected `database`"):
        xmkd.read_annotations(annotated(tmp_path, content))


@pytest.mark.parametrize("row, line", [("aaaaaaaaaa0,-30,dog,train\n", 1), ("aaaaaaaaaa0,30,dog,train\n\naaaaaaaaaa1,30,dog,train,,\n", 3), ("aaaaaaaaaa0,3.5,dog,train\n", 1),
                                       ('aaaaaaaaaa0,30,"dog\nor cat",train\nx\n', 3), ("aaaaaaaaaa0," + "9" * 5000 + ",dog,train\n", 1), ('aaaaaaaaaa0,30,"' + "x" * 200_000, 1)])
def test_vggsound_rows_that_cannot_be_read_name_the_line_of_the_file(tmp_path, row, line):
    (tmp_path / "vggsound.csv").write_text(row)
    with pytest.raises(xmkd.InputError, match=f"vggsound.csv:{line}: "):
        xmkd.read_vggsound(tmp_path)


def test_no_list_opens_what_lies_outside_its_folder(tmp_path):
    """Ids with a path in them are no more than names that no file has; list and feature files that are pipes are none."""
    outside, root = tmp_path / "x.mp4", tmp_path / "data"
    encode(outside), encode(tmp_path / "x.wav"), np.save(tmp_path / "x.npy", np.ones(3))
    root.mkdir()
    audioset(root, train=("aaaaaaaaaa0", "../../etc/x", "../x.wav000")), ucf101(root, b"Typing/../../x.avi 95\n../x.mp4 95\n")
    annotated(root, '\ufeff{"database": {"../../x": {"subset": "training", "label": "a"}, "../x": {"subset": "training", "label": "a"}, "v_aaaaaaaaaa0": {"subset": "training", "label": "a"}}}')
    (root / "vggsound.csv").write_text("../../etc/x,30,dog,train\naaaaaaaaaa0,30,dog,train\n")
    (root / "aaaaaaaaaa0_000030.mp4").touch()
    for name in ("all_eval_segments.csv", "activity_net.v9.json", "x.npy"):
        os.mkfifo(root / name)
    code = """
for read in (xmkd.read_audioset, xmkd.read_ucf101, xmkd.read_annotations, xmkd.read_vggsound):
    clips, _ = read(sys.argv[1], skipped=(skipped := []))
    print(len(clips), len(skipped), all(path.startswith(sys.argv[1]) for clip in clips for path in clip[3:5] if path))
print(xmkd.find_features(sys.argv[1], [xmkd.Clip('../x', (0,), 'train')]), xmkd.find_layout(sys.argv[1]))"""
    assert in_time(60, code, root).split() == "2 2 True 1 2 True 1 2 True 1 1 True {} ucf101".split()


def test_audioset_without_a_match_shows_ids_and_files(tmp_path):
    with pytest.raises(xmkd.InputError, match=r"listed: aaaaaaaaaa0, bbbbbbbbbb0; files seen: other.wav"):
        xmkd.read_audioset(audioset(tmp_path, files=["other.wav"]))


def test_ucf101_tolerates_case_crlf_and_leaves_mute_classes_out(tmp_path):
    lists, media = tmp_path / "ucfTrainTestlist", tmp_path / "UCF-101"
    lists.mkdir()
    (lists / "classInd.txt").write_bytes(b"37 HandstandPushups\r\n95 Typing\r\n11 Biking\r\n")
    (lists / "trainlist02.txt").write_bytes(b"HandstandPushups/v_HandStandPushups_g08_c01.avi 37\r\nTyping/v_Typing_g08_c01.avi 95\r\nBiking/v_Biking_g08_c01.avi 11\r\n")
    (lists / "testlist02.txt").write_bytes(b"Typing/v_Typing_g01_c01.avi\r\nTyping/v_Typing_g01_c02.avi\r\n")
    for name in ("HandStandPushups/v_HandstandPushups_g08_c01.avi", "Typing/v_Typing_g08_c01.avi", "Biking/v_Biking_g08_c01.avi", "Typing/v_Typing_g01_c01.avi"):
        (media / name).parent.mkdir(parents=True, exist_ok=True)
        (media / name).touch()
    skipped = []
    clips, classes = xmkd.read_ucf101(tmp_path, fold=2, skipped=skipped)
    assert classes == ["HandstandPushups", "Typing"]
    assert [(c.id, c.labels, c.split) for c in clips] == [("v_HandStandPushups_g08_c01", (0,), "train"), ("v_Typing_g08_c01", (1,), "train"), ("v_Typing_g01_c01", (1,), "eval")]
    assert [path for path, _ in skipped] == ["Biking/v_Biking_g08_c01.avi", "v_Typing_g01_c02"]
    with pytest.raises(xmkd.InputError, match="trainlist01.txt is missing"):
        xmkd.read_ucf101(tmp_path, fold=1)


@needs_testdata
def test_the_published_lists_parse_whole(tmp_path):
    root = tmp_path / "audioset"
    (root / "media").mkdir(parents=True)
    for name in ("balanced_train_segments.csv", "eval_segments.csv", "class_labels_indices.csv"):
        os.symlink(TESTDATA / "metadata" / "audioset" / name, root / name)
    (root / "media" / "Y--PJHxphWEs.wav").touch()
    skipped = []
    clips, classes = xmkd.read_audioset(root, skipped=skipped)
    assert len(classes) == 527 and len(clips) == 1 and len(skipped) == 22160 + 20371 - 1 and clips[0].start == 30.0
    os.symlink(TESTDATA / "metadata" / "ucf101" / "ucfTrainTestlist", tmp_path / "ucfTrainTestlist")
    media = tmp_path / "UCF-101"
    media.mkdir()
    for fold in (1, 2, 3):
        for part in ("train", "test"):
            for line in (tmp_path / "ucfTrainTestlist" / f"{part}list0{fold}.txt").read_text().split("\n"):
                if line.strip():
                    (media / Path(line.split()[0]).name).touch()
    clips, classes = xmkd.read_ucf101(tmp_path)
    authors = json.loads((TESTDATA / "metadata" / "authors" / "ucf51_annotation.json").read_text())
    assert [c.lower() for c in classes] == [c.lower() for c in authors["labels"]]
    assert (sum(c.split == "train" for c in clips), sum(c.split == "eval" for c in clips)) == (4901, 1944)      # nine have no sound


def test_activitynet_segments_are_clips_and_whole_videos_serve_several(tmp_path):
    entry = lambda subset, *segments: {"subset": subset, "duration": 60, "annotations": [{"label": label, "segment": [a, b]} for label, a, b in segments]}
    (tmp_path / "activity_net.v1-3.min.json").write_text(json.dumps({"version": "1.3", "taxonomy": [], "database": {
        "aaaaaaaaaa0": entry("training", ("Surfing", 1.5, 9.0), ("Archery", 20, 31)), "-bbbbbbb_b0": entry("validation", ("Surfing", 0, 5)),
        "cccccccccc0": entry("training", ("Surfing", 0, 5)), "ddddddddddd": entry("testing")}}))
    for name in ("v_aaaaaaaaaa0.mkv", "-bbbbbbb_b0.mp4", "v_ddddddddddd.mp4"):
        (tmp_path / name).touch()
    skipped = []
    clips, classes = xmkd.read_annotations(tmp_path, skipped)
    assert classes == ["Archery", "Surfing"] and xmkd.find_layout(str(tmp_path)) == "activitynet"
    assert [(c.id, c.labels, c.split, c.start, c.end, Path(c.video).name) for c in clips] == [
        ("v_aaaaaaaaaa0_0", (1,), "train", 1.5, 9.0, "v_aaaaaaaaaa0.mkv"), ("v_aaaaaaaaaa0_1", (0,), "train", 20, 31, "v_aaaaaaaaaa0.mkv"),
        ("v_-bbbbbbb_b0_0", (1,), "eval", 0, 5, "-bbbbbbb_b0.mp4")]
    assert [i for i, _ in skipped] == ["v_cccccccccc0_0"] and all(c.named for c in clips)
    for name in ("v_aaaaaaaaaa0_1.mp4", "v_cccccccccc0.hdf5"):                               # one segment cut out; frames of a whole video tell no segment
        (tmp_path / name).touch()
    files = lambda: [(c.id, Path(c.video).name) for c in xmkd.read_annotations(tmp_path)[0]]
    assert files() == [("v_aaaaaaaaaa0_0", "v_aaaaaaaaaa0.mkv"), ("v_aaaaaaaaaa0_1", "v_aaaaaaaaaa0.mkv"), ("v_-bbbbbbb_b0_0", "-bbbbbbb_b0.mp4")]
    (tmp_path / "v_aaaaaaaaaa0.mkv").unlink()
    assert files() == [("v_aaaaaaaaaa0_1", "v_aaaaaaaaaa0_1.mp4"), ("v_-bbbbbbb_b0_0", "-bbbbbbb_b0.mp4")]
    (tmp_path / "activity_net.v1-3.min.json").write_text('{"database": {"aaaaaaaaaa0": {"subset": "training"}}}')
    with pytest.raises(xmkd.InputError, match="expected `database` of id: subset, label"):
        xmkd.read_annotations(tmp_path)


def test_a_file_of_one_clips_name_is_not_another_clips_whole_video(tmp_path):
    (tmp_path / "annotation.json").write_text(json.dumps({"database": {name: {"subset": "training", "label": "a"} for name in ("dog", "dog_1")}}))
    for name in ("dog.mp4", "dog_1.mp4"):
        (tmp_path / name).touch()
    assert [(c.id, Path(c.video).name) for c in xmkd.read_annotations(tmp_path)[0]] == [("dog", "dog.mp4"), ("dog_1", "dog_1.mp4")]


@needs_testdata
@pytest.mark.parametrize("name, layout, train, evaluation", [("activitynet", "activitynet", 15232, 7555), ("ucf51", "annotation", 4892, 1944)])
def test_the_authors_annotations_parse_whole(tmp_path, name, layout, train, evaluation):
    text = (TESTDATA / "metadata" / "authors" / f"{name}_annotation.json").read_text()
    (tmp_path / "annotation.json").write_text(text)
    for key in json.loads(text)["database"]:
        (tmp_path / f"{key}.hdf5").touch()
    clips, classes = xmkd.read_annotations(tmp_path, skipped := [])
    assert classes == json.loads(text)["labels"] and not skipped and xmkd.find_layout(str(tmp_path)) == layout
    assert [sum(c.split == part for c in clips) for part in ("train", "eval")] == [train, evaluation] and not any(c.audio for c in clips)


@pytest.mark.parametrize("table, rows, names", [
    ("vggsound.csv", '-aaaaaaaaa0,30,"playing drums, loud",train\nvbbbbbbbbb0,0,dog,test\ncccccccccc0,5,dog,train\n', ["-aaaaaaaaa0_000030.mp4", "vbbbbbbbbb0_000000.wav", "vbbbbbbbbb0_000000.mkv"]),
    ("vggsound.csv", '-aaaaaaaaa0,30,"playing drums, loud",train\nvbbbbbbbbb0,0,dog,test\ncccccccccc0,5,dog,train\n', ["v-aaaaaaaaa0_30_40_out.mkv", "vvbbbbbbbbb0_0_10_out.mkv"]),
    ("vggsound.csv", '-aaaaaaaaa0,30,"playing drums, loud",train\nvbbbbbbbbb0,0,dog,test\ncccccccccc0,5,dog,train\n', ["-aaaaaaaaa0_30000_40000.mp4", "vbbbbbbbbb0_0_10000.mp4"]),
    ("test.csv", 'vbbbbbbbbb0_000000.mp4,dog\n', ["vbbbbbbbbb0_000000.mp4"])])
def test_vggsound_files_are_found_by_id_and_start(tmp_path, table, rows, names):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / table).write_text(rows)
    for name in names:
        (tmp_path / name).touch()
    clips, classes = xmkd.read_vggsound(tmp_path, skipped := [])
    found = {c.id: (classes[c.labels[0]], c.split, c.start, c.end) for c in clips}
    assert found["vbbbbbbbbb0_000000"] == ("dog", "eval", 0, 10) and found.get("-aaaaaaaaa0_000030", ("playing drums, loud", "train", 30, 40))[2] == 30
    assert len(clips) == (2 if table == "vggsound.csv" else 1) and [i for i, _ in skipped] == (["cccccccccc0_000005"] if table == "vggsound.csv" else [])
    (tmp_path / "lists" / "vggsound.csv").write_text("aaaaaaaaaaa,1,dog,validation\n")
    with pytest.raises(xmkd.InputError, match="vggsound.csv:1: expected id, start"):
        xmkd.read_vggsound(tmp_path)


@needs_testdata
def test_the_published_vggsound_list_parses_whole(tmp_path):
    os.symlink(TESTDATA / "metadata" / "vggsound" / "test.csv", tmp_path / "test.csv")
    (tmp_path / "6jiO0tPLK7U_000090.mp4").touch()
    clips, classes = xmkd.read_vggsound(tmp_path, skipped := [])
    assert len(classes) == 309 and classes[clips[0].labels[0]] == "basketball bounce" and (clips[0].start, clips[0].end) == (90, 100) and len(skipped) == 15445


def test_hdf5_that_is_a_pipe_does_not_hang(tmp_path):
    pytest.importorskip("h5py")
    os.mkfifo(tmp_path / "a.hdf5")
    code = "try: xmkd.decode_hdf5(sys.argv[1])\nexcept xmkd.InputError as error: print(error)"
    assert in_time(60, code, tmp_path / "a.hdf5").strip() == f"{tmp_path}/a.hdf5: not a regular file"


def test_hdf5_frames_are_not_taken_for_sound(tmp_path):
    path = str(release(tmp_path / "ucf51", features=False) / "v_Zoo_g00_c01.hdf5")
    clip = xmkd.Clip("a", (0,), "eval", path, path)
    assert load_one(clip, "video", size=24).shape == (5, 3, 24, 32)
    with pytest.raises(xmkd.InputError, match="v_Zoo_g00_c01.hdf5: "):
        load_one(clip, "audio")


def test_hdf5_without_h5py_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(xmkd.InputError, match="a.hdf5: .*pip install h5py"):
        xmkd.decode_hdf5(tmp_path / "a.hdf5")


def test_folder_of_folders(tmp_path):
    for name in ("train/dog/1.wav", "train/cat/deep/2.mp4", "val/dog/3.mkv", "train/stray.mp4", "train/dog/readme.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    skipped = []
    clips, classes = xmkd.read_folder(tmp_path, skipped)
    assert classes == ["cat", "dog"] and {(c.id, c.labels[0], c.split, c.video is None) for c in clips} == {
        ("train/dog/1", 1, "train", True), ("train/cat/deep/2", 0, "train", False), ("val/dog/3", 1, "eval", False)}
    assert [Path(path).name for path, _ in skipped] == ["stray.mp4"]


def test_duration_decides_whether_a_file_is_cut(tmp_path):
    whole, cut = encode(tmp_path / "whole.mp4", seconds=4.0), encode(tmp_path / "cut.mp4", seconds=1.0)
    clip = xmkd.Clip("x", (0,), "train", whole, whole, 2.0, 3.0)
    assert load_one(clip, "video", fps=10.0, size=16)[0].float().mean() == pytest.approx(100, abs=4)      # second 2 of 4
    clip = clip._replace(audio=cut, video=cut)
    assert load_one(clip, "video", fps=10.0, size=16)[0].float().mean() == pytest.approx(0, abs=4)        # its own start
    assert len(load_one(clip, "audio")) == pytest.approx(32000, abs=1500)
    between = encode(tmp_path / "between.wav", seconds=3.0)                                   # as near to 2 s as to 4 s: taken as whole
    assert len(load_one(clip._replace(audio=between, end=4.0), "audio")) == 32000
    late = clip._replace(audio=whole, video=whole, start=60.0, end=70.0)                     # past the end of a whole video: no view of its beginning
    with pytest.raises(xmkd.InputError, match="whole.mp4: no video between 60 and 70 s"):
        load_one(late._replace(named=True), "video")
    assert len(load_one(late._replace(id="WHOLE", named=True), "video", fps=4.0)) == 16      # its name says that it is the segment itself


def moving(path, times, codec="libx264", **options):
    """A film of a square that is elsewhere in each frame, shown at `times`, in milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"bf": "3", "b_strategy": "0", "preset": "fast", **options})
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.time_base = 64, 48, "yuv420p", Fraction(1, 1000)
        for k, at in enumerate(times):
            image = np.full((48, 64, 3), 20 + k * 7 % 200, np.uint8)
            image[8:24, k * 3 % 56:k * 3 % 56 + 8] = 255, 0, k * 13 % 255
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = at, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


@pytest.mark.parametrize("name, times", [("even.mp4", range(0, 4000, 40)), ("even.mov", range(0, 6000, 40)), ("even.avi", range(0, 4000, 40)), ("gap.mp4", [*range(0, 2000, 40), *range(3480, 5480, 40)]),
                                         ("uneven.mp4", np.cumsum([20, 33, 90, 40] * 20).tolist()), ("uneven.mkv", np.cumsum([20, 33, 90, 40] * 20).tolist())])
def test_frames_that_nothing_needs_are_not_decoded_and_not_missed(tmp_path, monkeypatch, name, times):
    path, decoded, fewer = moving(tmp_path / name, times), [], False

    def spy(streams, start, end, fps=math.inf, real=xmkd.timed_frames):
        frames, = real(streams, start, end, limit or fps)
        return [(decoded.append(item[0]) or item for item in frames)]
    monkeypatch.setattr(xmkd, "timed_frames", spy)
    for fps, start, end in itertools.product((1.0, 2.0, 4.0, 7.0, 12.5, 30.0), (0.0, 0.7), (None, 2.1)):
        counts = []
        for limit in (math.inf, None):
            decoded.clear()
            counts.append((xmkd.decode_video(path, start, end, fps, 24), len(decoded)))
        assert torch.equal(counts[0][0], counts[1][0])
        fewer |= counts[1][1] < 0.8 * counts[0][1]
    assert fewer == name.startswith("even.m")


@pytest.mark.parametrize("start, end", [(0.0, None), (1.0, 2.5), (60.0, 64.0)])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_a_file_with_both_streams_is_read_once_for_both(tmp_path, monkeypatch, name, start, end):
    path, opened = encode(tmp_path / name, seconds=4.0), []
    clip = xmkd.Clip("x", (0,), "train", path, path, start, end)
    alone = [load_one(clip, kind, fps=10.0, size=24) for kind in ("audio", "video")]
    monkeypatch.setattr(xmkd, "timed_frames", lambda *args, real=xmkd.timed_frames: opened.append(args) or real(*args))
    for order in ((0, 1), (1, 0)):
        both = [*xmkd.load_streams(clip, [("audio", "video")[k] for k in order], fps=10.0, size=24)]
        assert all(torch.equal(stream, alone[k]) for stream, k in zip(both, order, strict=True))
    assert [len(streams) for streams, *_ in opened] == [2, 2] and len(alone[0]) > 40000
    monkeypatch.setattr(xmkd.os.path, "getsize", lambda path: 2 ** 27)              # a large one is not held in memory
    assert all(map(torch.equal, xmkd.load_streams(clip, ("audio", "video"), fps=10.0, size=24), alone))
    assert [len(streams) for streams, *_ in opened[2:]] == [1, 1] and not [*xmkd.load_streams(clip, ())]


def test_each_stream_tells_by_its_own_file_whether_it_is_cut(tmp_path):
    """The authors' frames of a segment beside the sound of the whole video."""
    clip = xmkd.Clip("v_x_0", (0,), "train", encode(tmp_path / "v_x.mp4", seconds=4.0), encode(tmp_path / "v_x_0.mp4", seconds=2.0), 1.0, 2.5, named=True)
    assert len(load_one(clip, "audio")) == pytest.approx(48000, abs=50) and len(load_one(clip, "video", fps=4.0)) == 8


# ------------------------------------------------------------------------------------------------ 5. demo data
def test_demo_dials_change_the_teacher_only_and_by_their_share():
    clips, classes = xmkd.demo_clips(tags=True)
    assert len(classes) == 10 and {c for clip in clips for c in clip.labels} == set(range(10))
    train = [c for c in clips if c.split == "train"]
    truth = [xmkd.demo_truth(c, 3, 0.6, 0.5) for c in train]
    assert abs(np.mean([bool(mixed) for _, mixed in truth]) - 0.6) < 0.07
    wrong = [set(shown) != set(c.labels) for c, (shown, _) in zip(train, truth)]
    assert abs(np.mean(wrong) - 0.5) < 0.07 and not any(set(s) & set(c.labels) for c, (s, _), w in zip(train, truth, wrong) if w)
    assert all(sorted(shown) == sorted(c.labels) and not mixed for c in clips for shown, mixed in [xmkd.demo_truth(c, 3, 0, 0)])
    calm, hard = (dict(student="audio", seed=3, noise=d, mismatch=d, fps=4.0, side=32) for d in (0.0, 1.0))
    for clip in clips[:5]:
        assert torch.equal(*(next(xmkd.demo_streams(clip, ["audio"], **dials)) for dials in (calm, hard)))
        assert not torch.equal(*(next(xmkd.demo_streams(clip, ["video"], **dials)) for dials in (calm, hard)))
    assert [stream.shape for stream in xmkd.demo_streams(clips[0], ["audio", "video"], **calm)] == [(32000,), (4, 3, 32, 32)]


# ------------------------------------------------------------------------------------------------ 6. store and views
def test_windows_loop_and_spread():
    assert xmkd.sliding_windows(5, 3, 3) == [[0, 1, 2], [3, 4, 3]] and xmkd.sliding_windows(2, 4) == [[0, 1, 0, 1]]
    assert xmkd.even_windows(20, 4, 3)[0] == [0, 1, 2, 3] and len(xmkd.even_windows(20, 4, 3)) == 3 and xmkd.even_windows(9, 4, 1)


def demo_data(tmp_path, clips=12):
    every, classes = xmkd.demo_clips(tags=False)
    load = functools.partial(xmkd.demo_streams, student="video", seed=3, noise=0.3, mismatch=0.2, fps=6.0, side=24)
    store = xmkd.ClipStore(tmp_path, every[:clips], load, {"audio": 1, "video": 1})
    return xmkd.Data(store, classes, False, list(range(clips - 2)), [clips - 2, clips - 1])


def test_store_decodes_once_and_tries_again_what_failed(tmp_path):
    calls = []

    def load(clip, kinds):
        calls.append(clip.id)
        if clip.id == "bad":
            raise xmkd.InputError("bad: broken")
        for kind in kinds:
            yield torch.full((3, 3, 16, 16), 100, dtype=torch.uint8) if kind == "video" else torch.linspace(-2, 2, 9)
    clips = [xmkd.Clip(i, (0,), "train", None, None) for i in ("good", "bad")]
    for _ in range(2):
        store = xmkd.ClipStore(tmp_path, clips, load, {"audio": 1, "video": 1})
        assert store.decode([(0, ("audio",)), (0, ("video",)), (1, ("video",))], 0, lambda done, total: None) == [(0, [9], 18, ""), (0, [3], store.streams(0, ["video"])[0].nbytes, ""), (1, [], 0, "bad: broken")]
    assert calls == ["good", "good", "bad", "bad"]                                 # a failure may have been of the moment
    frames, samples = store.streams(0, ["video"])[0], store.streams(0, ["audio"])[0]
    assert frames.dtype == np.uint8 and (xmkd.read_frames(frames, [2, 0, 2]) - 100.0).abs().max() < 6
    assert samples.dtype == np.int16 and samples[0] == -32767 and samples[-1] == 32767
    raw = np.arange(72, dtype=np.uint8).reshape(6, 2, 2, 3)
    for window in ([2, 0, 2], [1, 2, 3], [0, 5, 2], [4], range(6), [5, 4, 3]):
        assert torch.equal(xmkd.read_frames(raw, window), torch.from_numpy(raw[[*window]]).permute(0, 3, 1, 2))


def test_an_unforeseen_error_costs_its_clip_only_and_a_full_disk_ends_the_run(tmp_path, monkeypatch):
    def load(clip, kinds):
        if clip.id == "bad":
            raise RuntimeError("what nobody thought of")
        yield torch.zeros(10)
    store = xmkd.ClipStore(tmp_path, [xmkd.Clip(name, (0,), "train", name, name) for name in ("bad", "good")], load, {"audio": 1, "video": 1})
    jobs, mute = [(0, ["audio"]), (1, ["audio"])], lambda done, total: None
    assert [(i, lengths, reason) for i, lengths, _, reason in store.decode(jobs, 0, mute)] == [(0, [], "RuntimeError: what nobody thought of"), (1, [10], "")]
    def full(file, array):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(xmkd.np, "save", full)
    store.clips[1] = store.clips[1]._replace(id="other")
    with pytest.raises(OSError, match="No space left"):
        store.decode(jobs, 0, mute)


def test_demo_clips_are_not_mistaken_for_a_file_of_that_name(tmp_path, monkeypatch):
    for make in (lambda: None, (tmp_path / "demo").mkdir, lambda: ((tmp_path / "demo").rmdir(), (tmp_path / "demo").touch())):
        make()
        monkeypatch.chdir(tmp_path)
        store = demo_data(tmp_path / "cache").store
        assert len({store.key(i, kind) for i in range(len(store.clips)) for kind in ("audio", "video")}) == 2 * len(store.clips)


def test_a_damaged_file_of_the_cache_is_decoded_again(tmp_path):
    store = demo_data(tmp_path).store
    whole = np.array(store.streams(0, ["video"])[0])
    file, = tmp_path.rglob("*.npy")
    for content in (b"", file.read_bytes()[:90], file.read_bytes()[:900], b"no array", file.read_bytes()[:128] + bytes(file.stat().st_size - 128)):
        file.write_bytes(content)
        assert np.array_equal(store.streams(0, ["video"])[0], whole) and np.array_equal(np.load(file), whole)


def test_streamed_views_equal_those_of_a_raw_cache_and_jpeg_comes_close(tmp_path):
    data, spec = demo_data(tmp_path / "jpeg"), xmkd.ViewSpec("video", 4, 16)
    store = data.store
    views = {}
    for name, folder, raw in (("jpeg", tmp_path / "jpeg", False), ("raw", tmp_path / "raw", True), ("streamed", None, False)):
        kept = data._replace(store=xmkd.ClipStore(folder, store.clips, store.load, store.depends, raw))
        for _ in range(2):                                                         # the second time from the cache
            views[name] = xmkd.Views(kept, spec, "train")[3, 7]
            sound = xmkd.Views(kept, xmkd.ViewSpec("audio", samples=9000), "train")[3, 7][0]
        assert torch.equal(sound, xmkd.Views(data, xmkd.ViewSpec("audio", samples=9000), "train")[3, 7][0])
    assert all(torch.equal(a, b) for a, b in zip(views["raw"], views["streamed"]))
    jpeg, raw, streamed = (xmkd.ClipStore(folder, store.clips, store.load, store.depends, raw).key(0, "video") for folder, raw in ((tmp_path, False), (tmp_path, True), (None, False)))
    assert jpeg != raw == streamed                                                 # a teacher of one does not serve the other
    assert torch.equal(views["jpeg"][1], views["raw"][1]) and 0 < (views["jpeg"][0].float() - views["raw"][0].float()).abs().mean() < 8
    assert {len([*(tmp_path / name).rglob("*.npy")]) for name in ("jpeg", "raw")} == {2}


def test_views_follow_from_their_seed_and_not_from_the_worker(tmp_path):
    data, spec = demo_data(tmp_path), xmkd.ViewSpec("video", frames=4, size=16)
    batches = []
    for workers in (0, 2):
        loader = data.loader(data.train, spec, "train", {"batch_size": 4, "workers": workers, "mixup": False, "class_balanced": False}, seed=5)
        loader.batch_sampler.epoch = 3
        torch.manual_seed(workers)
        batches.append([[views, boxes] for views, boxes, *_ in loader])
    assert len(batches[0]) == 3 and all(torch.equal(x, y) for a, b in zip(*batches) for x, y in zip(a, b))
    views = xmkd.Views(data, spec, "train")
    assert views[0, 1][0].shape == (1, 4, 3, 24, 24) and not torch.equal(views[0, 1][1], views[0, 2][1])
    windows, boxes = xmkd.Views(data, spec, "test")[0, 0]
    assert windows.shape == (2, 4, 3, 24, 24) and boxes.tolist() == [[0, 0, 24, 24]] * 2     # 6 frames: a window of 4, then one of 2, looped
    (sound,), _ = xmkd.Views(data, xmkd.ViewSpec("audio", samples=48000), "train")[0, 1][:2]
    assert sound.shape == (48000,) and torch.equal(sound[:16000], sound[32000:])   # one second, looped


def test_boxes_cut_scale_and_mirror_as_their_definition_says():
    frames, size = (rand(2, 3, 3, 20, 30, seed=1) * 255).to(torch.uint8), 6
    boxes = torch.tensor([[4.0, 3.0, 19.0, 14.0], [25.5, 2.0, 7.25, 20.0]])                  # the second one mirrors
    prepare = xmkd.Prepare(size)
    ours = prepare(frames, boxes) * prepare.std + prepare.mean
    def bilinear(image, y, x):                                                               # pixel centres lie at .5
        y, x = min(max(y - 0.5, 0), 19), min(max(x - 0.5, 0), 29)
        (top, left), (dy, dx) = (int(y), int(x)), (y % 1, x % 1)
        below, right = min(top + 1, 19), min(left + 1, 29)
        return float((1 - dy) * ((1 - dx) * image[top, left] + dx * image[top, right]) + dy * ((1 - dx) * image[below, left] + dx * image[below, right]))
    for b, t, c, i, j in ((0, 0, 0, 0, 0), (0, 2, 1, 5, 2), (1, 1, 2, 0, 0), (1, 2, 0, 3, 5), (1, 0, 1, 5, 4)):
        x1, y1, x2, y2 = boxes[b].tolist()
        parts = [bilinear(frames[b, t, c].float(), y1 + (y2 - y1) * (i + u) / size, x1 + (x2 - x1) * (j + v) / size) for u in (0.25, 0.75) for v in (0.25, 0.75)]
        assert ours[b, c, t, i, j].item() == pytest.approx(sum(parts) / 4 / 255, abs=1e-5)
    plain, mirrored = (prepare(frames[:1], torch.tensor([box])) for box in ([2.0, 1.0, 18.0, 17.0], [18.0, 1.0, 2.0, 17.0]))
    assert torch.allclose(plain.flip(-1), mirrored, atol=1e-5)
    smooth = torch.linspace(0, 255, 40).expand(1, 1, 3, 30, 40).to(torch.uint8)
    reference = xmkd.v2.functional.resized_crop(smooth[0, 0], 3, 5, 24, 32, [12, 12], antialias=True)
    ours = xmkd.Prepare(12)(smooth, torch.tensor([[5.0, 3.0, 37.0, 27.0]]))[0, :, 0] * prepare.std[:, 0] + prepare.mean[:, 0]
    assert (ours * 255 - reference).abs().max() < 2


def test_random_boxes_keep_to_frame_area_and_shape(tmp_path):
    data = demo_data(tmp_path, clips=1)
    views = xmkd.Views(data, xmkd.ViewSpec("video", 4, 16, crop_area=0.5), "train")
    torch.manual_seed(0)
    boxes = torch.cat([views.random_box(torch.zeros(1, 3, 60, 80)) for _ in range(300)])
    width, height = (boxes[:, 2] - boxes[:, 0]), boxes[:, 3] - boxes[:, 1]
    assert 0.4 < (width < 0).float().mean() < 0.6 and boxes.min() >= 0 and boxes[:, [0, 2]].max() <= 80 and boxes[:, 3].max() <= 60
    area, ratio = width.abs() * height / 4800, width.abs() / height
    assert area.min() > 0.48 and area.max() <= 1 and ratio.min() > 0.72 and ratio.max() < 1.37
    still = xmkd.Views(data, xmkd.ViewSpec("video", 4, 16, flip=False), "train")
    assert all((box := still.random_box(torch.zeros(1, 3, 60, 80))[0])[2] > box[0] for _ in range(50))


def test_frames_of_unequal_size_share_a_batch_and_their_crops_do_not_notice():
    frames = [(rand(1, 2, 3, 20, w, seed=w) * 255).to(torch.uint8) for w in (30, 24)]
    boxes = [torch.tensor([[0.0, 0.0, w, 20.0]]) for w in (30, 24)]
    views, joined, counts = xmkd.join_views([*zip(frames, boxes)])
    assert counts == [1, 1] and views.shape == (2, 2, 3, 20, 30)
    for size in (8, 64):                                                             # shrunk, and enlarged up to the very edge
        together = xmkd.Prepare(size)(views, joined)
        assert all(torch.allclose(together[i], xmkd.Prepare(size)(frames[i], boxes[i])[0], atol=1e-5) for i in (0, 1))


def test_a_last_batch_of_one_joins_the_one_before():
    for n, sizes in ((9, [4, 5]), (8, [4, 4]), (10, [4, 4, 2]), (3, [3]), (1, [1])):
        batches = xmkd.EpochBatches(range(n), 4, seed=0)
        assert [len(b) for b in batches] == sizes and len(batches) == len(sizes)
        assert sorted(i for b in batches for i, _ in b) == list(range(n))


def test_equal_embeddings_rank_misses_first():
    same = torch.ones(3, 4)                                                        # a network that has collapsed finds nothing
    assert xmkd.retrieval_metrics(same, same, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), ks=(1, 2))["R@1"] == 0
    twins = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])                     # two hits that are alike
    found = xmkd.retrieval_metrics(twins[:1], twins, torch.tensor([0]), torch.tensor([0, 0, 1]), ks=(1,))
    assert found == {"R@1": 1, "mAP": 1, "mAP_released": 1}


def test_processes_draw_parts_of_the_same_batches(monkeypatch):
    for clips, size, multiple, sizes in ((19, 8, 2, [8, 8 + 2]), (20, 8, 2, [8, 8, 4]), (23, 8, 4, [8, 12]), (3, 8, 2, [2])):
        monkeypatch.setattr(xmkd, "RANK", 0), monkeypatch.setattr(xmkd, "WORLD", 1)
        whole = [*xmkd.EpochBatches(range(clips), size, 0, None, multiple)]
        assert [len(batch) for batch in whole] == sizes
        monkeypatch.setattr(xmkd, "WORLD", 2)
        parts = []
        for rank in (0, 1):
            monkeypatch.setattr(xmkd, "RANK", rank)
            parts.append([*xmkd.EpochBatches(range(clips), size, 0, None, multiple)])
        assert [a + b for a, b in zip(*parts)] == whole and all(len(a) == len(b) for a, b in zip(*parts))


def test_class_balanced_batches_draw_every_class_as_often(tmp_path):
    clips = [xmkd.Clip(str(i), (0,) if i < 90 else (1, 2) if i < 95 else (2,), "train") for i in range(100)]
    data = xmkd.Data(xmkd.ClipStore(tmp_path, clips, None, {}), ["a", "b", "c"], True, list(range(100)), [])
    settings = {"batch_size": 10, "workers": 0, "mixup": False, "class_balanced": True}
    sampler = data.loader(data.train, xmkd.ViewSpec("audio"), "train", settings).batch_sampler
    drawn = []
    for sampler.epoch in range(60):
        drawn += [i for batch in sampler for i, _ in batch]
    share = np.bincount(drawn, minlength=100) / len(drawn)
    assert share[:90].sum() == pytest.approx(1 / 3, abs=0.02)                      # class a: 90 clips
    assert share[90:95].sum() == pytest.approx(1 / 3 + 1 / 6, abs=0.02) and share[95:].sum() == pytest.approx(1 / 6, abs=0.02)


def test_mixup_mixes_neighbours_and_their_tags_alike():
    torch.manual_seed(0)
    views, tags = rand(6, 5, 4), (rand(6, 3, seed=1) > 0.5).float()
    mixed, soft = xmkd.mixup(views, tags)
    torch.manual_seed(0)
    for k, weight in enumerate(torch.rand(3)):
        assert torch.allclose(mixed[k], weight * views[2 * k] + (1 - weight) * views[2 * k + 1])
        assert torch.allclose(soft[k], weight * tags[2 * k] + (1 - weight) * tags[2 * k + 1])
    overlap = xmkd.label_overlap(soft)
    assert torch.allclose(overlap.diag()[soft.any(1)], torch.ones(int(soft.any(1).sum()))) and overlap.max() <= 1 + 1e-6


# ------------------------------------------------------------------------------------------------ 7. metrics
def test_map_and_auc_agree_with_their_definitions_ties_included():
    scores, labels = (rand(40, 6) * 8).round() / 8, (rand(40, 6, seed=1) > 0.7).long()
    labels[:, 5] = 0                                                               # no positive: left out
    aps, aucs = [], []
    for c in range(5):
        s, y = scores[:, c].tolist(), labels[:, c].tolist()
        recall, ap = 0.0, 0.0
        for threshold in sorted(set(s), reverse=True):                             # average precision as scikit-learn defines it
            picked = [t for v, t in zip(s, y) if v >= threshold]
            ap += (sum(picked) / sum(y) - recall) * sum(picked) / len(picked)
            recall = sum(picked) / sum(y)
        pairs = [(a > b) + 0.5 * (a == b) for a, t in zip(s, y) for b, u in zip(s, y) if t and not u]
        aps.append(ap), aucs.append(sum(pairs) / len(pairs))
    assert xmkd.mean_average_precision(scores, labels) == pytest.approx(np.mean(aps), abs=1e-12)
    assert xmkd.mean_auc(scores, labels) == pytest.approx(np.mean(aucs), abs=1e-12)
    assert xmkd.score("audio_tagging", scores, labels)["d_prime"] == pytest.approx(math.sqrt(2) * __import__("statistics").NormalDist().inv_cdf(np.mean(aucs)))
    assert set(xmkd.score("audio_tagging", scores[:2, :3], torch.tensor([[1, 0, 0], [1, 0, 0]]))) == {"mAP"}                 # no class with both kinds of clip
    with pytest.raises(ValueError, match="none of 6 classes"):
        xmkd.mean_average_precision(scores, labels * 0)


def test_topk_and_retrieval_agree_with_loops():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]])
    assert xmkd.topk_accuracy(scores, torch.tensor([2, 0])) == 0.5 and xmkd.topk_accuracy(scores, torch.tensor([2, 0]), 2) == 1.0
    q, g, ql, gl = rand(9, 4) - 0.5, rand(30, 4, seed=1) - 0.5, torch.arange(9) % 4, torch.arange(30) % 3       # label 3 has no match
    aps, released, ranks = [], [], []
    for i in range(9):
        order = sorted(range(30), key=lambda j: -float(F.cosine_similarity(q[i], g[j], dim=0)))
        hits = [int(gl[j] == ql[i]) for j in order]
        precision = [sum(hits[:n + 1]) / (n + 1) for n in range(30) if hits[n]]
        short = [p for n, p in zip([n for n in range(30) if hits[n]], precision) if n < 5]
        aps.append(np.mean(precision) if precision else 0.0)
        released += [np.mean(short)] if short else []
        ranks.append(hits.index(1) if 1 in hits else 99)
    ours = xmkd.retrieval_metrics(q, g, ql, gl, ks=(1, 5), topk=5)
    assert ours["mAP"] == pytest.approx(np.mean(aps)) and ours["mAP_released"] == pytest.approx(np.mean(released))
    assert ours["R@1"] == pytest.approx(np.mean([r < 1 for r in ranks])) and ours["R@5"] == pytest.approx(np.mean([r < 5 for r in ranks]))
    few = xmkd.retrieval_metrics(q[:4], g[:3], ql[:4], gl[:3])          # a query without a match is none with 50 of 3 either
    assert few["R@5"] == few["R@50"] == 0.75


def test_sound_and_picture_of_a_clip_may_be_two_files_in_every_layout(tmp_path):
    def touch(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
    touch("train/a/1.mkv", "train/a/1.wav", "train/a/2.wav", "val/a/3.mp4")
    clips, _ = xmkd.read_folder(tmp_path)
    found = {c.id: [p and os.path.relpath(p, tmp_path) for p in (c.audio, c.video)] for c in clips}
    assert len(clips) == 3 and found == {"train/a/1": ["train/a/1.wav", "train/a/1.mkv"], "train/a/2": ["train/a/2.wav", None], "val/a/3": ["val/a/3.mp4"] * 2}
    touch("UCF-101/Archery/v_Archery_g01_c01.avi", "UCF-101/Archery/v_Archery_g02_c01.avi", "sound/v_Archery_g01_c01.wav", "lists")
    (tmp_path / "ucfTrainTestlist").mkdir()
    for name, text in (("classInd", "1 Archery"), ("trainlist01", "Archery/v_Archery_g01_c01.avi 1"), ("testlist01", "Archery/v_Archery_g02_c01.avi")):
        (tmp_path / "ucfTrainTestlist" / f"{name}.txt").write_text(text)
    one, two = xmkd.read_ucf101(tmp_path)[0]
    assert (one.audio, one.video) == (f"{tmp_path}/sound/v_Archery_g01_c01.wav", f"{tmp_path}/UCF-101/Archery/v_Archery_g01_c01.avi") and two.audio == two.video
    for mode, needs in (({}, ["audio", "video"]), ({"eval": "best.pt"}, ["video"])):        # who evaluates needs no sound
        settings = {"data": str(tmp_path), "task": "action_recognition", "split": "balanced", "fold": 1, **mode}
        assert xmkd.list_clips("ucf101", settings, [], xmkd.Console(quiet=True))[2]["eval"] == needs
    touch("whole/vbbbbbbbbb0.mp4", "train/x", "test/y")
    (tmp_path / "vggsound.csv").write_text("vbbbbbbbbb0,30,dog,train\n")
    clip, = xmkd.read_vggsound(tmp_path)[0]
    assert clip.video.endswith("whole/vbbbbbbbbb0.mp4") and (clip.start, clip.end) == (30, 40)


def test_vggsound_beside_folders_of_its_splits_is_no_folder_of_folders(tmp_path):
    for name in ("train", "test", "val"):
        (tmp_path / name).mkdir()
    assert xmkd.find_layout(str(tmp_path)) == "folder"
    (tmp_path / "val").rmdir()
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).touch()
    assert xmkd.find_layout(str(tmp_path)) == "vggsound"


def test_a_stream_without_times_is_counted_by_its_rate(tmp_path):
    video = xmkd.decode_video(encode(tmp_path / "a.h264", seconds=4.0, fps=25, audio=False), fps=5)
    assert len(video) == 20 and (video[1:].float().mean((1, 2, 3)) >= video[:-1].float().mean((1, 2, 3))).all()


def test_an_id_that_a_spreadsheet_has_spoilt_is_named(tmp_path):
    (tmp_path / "a_segments.csv").write_text("# comment\n#NAME?, 0.000, 10.000, \"/m/a\"\n")
    with pytest.raises(xmkd.InputError, match="a_segments.csv:2: expected .*got '#NAME"):
        list(xmkd.read_segments(str(tmp_path / "a_segments.csv"), "train", {"/m/a": 0}))


# ------------------------------------------------------------------------------------------------ 8.-11. the whole program
TINY = ["--width", "4", "--size", "32", "--frames", "2", "--teacher-epochs", "1", "--epochs", "2", "--workers", "0", "--quiet"]


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder data set encoded here: two labels told apart by tone and brightness, one file unreadable."""
    root = tmp_path_factory.mktemp("media")
    for part, count in (("train", 8), ("val", 3)):
        for label, tone in (("high", 2000.0), ("low", 300.0)):
            (root / part / label).mkdir(parents=True)
            for k in range(count):
                encode(root / part / label / f"{k}.mp4", seconds=1.0, tone=tone + 10 * k, fps=8 if label == "low" else 25)
    (root / "train" / "low" / "broken.mp4").write_bytes(b"")
    return root


@pytest.mark.parametrize("task, metrics", [("audio_tagging", {"mAP", "AUC", "d_prime"}), ("action_recognition", {"top1", "top5"}),
                                           ("video_retrieval", {"R@1", "R@5", "R@10", "R@20", "R@50", "mAP", "mAP_released", "top1", "top5"})])
def test_each_task_runs_on_files_and_leaves_what_it_promises(tmp_path, media, task, metrics):
    out = tmp_path / "run"
    assert xmkd.main([*TINY, "--task", task, "--data", str(media), "--teacher", "scratch", "--out", str(out), "--cache", str(media.parent / "cache")]) == 0
    results = json.loads((out / "results.json").read_text())
    assert {"task", "data", "method", "seed", "metrics", "teacher", "clips", "seconds"} <= results.keys()
    assert set(results["metrics"]) == metrics and results["epoch"] == 2 and all(0 <= results["metrics"][m] <= 1 for m in metrics - {"d_prime"})
    assert results["clips"] == {"train": 16, "eval": 6} and results["teacher"]["kind"] == "from scratch"
    assert list(csv.reader((out / "skipped.csv").open()))[1] == [str(media / "train/low/broken.mp4"), "empty file (0 bytes)"]
    assert [json.loads(line)["epoch"] for line in (out / "log.jsonl").read_text().splitlines()] == [2]
    assert json.loads((out / "config.json").read_text())["settings"]["width"] == 4
    saved = xmkd.load_checkpoint(out / "best.pt")
    network, noise_filter = xmkd.make_network(**saved["network"]), xmkd.ModalityNoiseFilter(2, 32)
    network.load_state_dict(saved["student"]), noise_filter.load_state_dict(saved["filter"])
    assert saved["classes"] == ["high", "low"]
    assert xmkd.main(["--eval", str(out / "best.pt"), "--out", str(tmp_path / "eval"), "--workers", "0", "--quiet"]) == 0
    again = json.loads((tmp_path / "eval" / "results.json").read_text())["metrics"]
    assert all(again[m] == pytest.approx(results["metrics"][m], abs=1e-6) for m in metrics)


def test_a_folder_full_of_broken_files_trains_on_the_others(tmp_path, media):
    root = tmp_path / "data"
    shutil.copytree(media, root)
    low, good = os.fsencode(root / "train" / "low"), (media / "train" / "low" / "0.mp4").read_bytes()
    bad = {b"text.mp4": b"<html>", b"half.mp4": good[:len(good) // 2], b"a b\nc.mp4": b"x", b"\xff.mp4": b"x", b"n" * 196 + b".mp4": b"x", b"concat.mp4": b"ffconcat version 1.0\nfile 0.mp4\n"}
    for name, content in bad.items():
        Path(os.fsdecode(low + b"/" + name)).write_bytes(content)
    os.mkfifo(low + b"/fifo.mp4"), os.symlink(b"loop.mp4", low + b"/loop.mp4"), os.symlink(b"..", low + b"/up"), os.mkdir(low + b"/folder.mp4")
    encode(root / "train" / "low" / "mute.mp4", audio=False), encode(root / "train" / "low" / "blind.mp4", video=False)
    shutil.copy(media / "train" / "low" / "1.mp4", low + b"/good \xfe\n.mp4")
    arguments = [*TINY, "--task", "action_recognition", "--data", root, "--method", "student", "--epochs", "1", "--out", tmp_path / "run", "--max-skipped", "0.9"]
    in_time(120, "sys.exit(xmkd.main(sys.argv[1:]))", *arguments)
    with (tmp_path / "run" / "skipped.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        reasons = {os.fsencode(path).rpartition(b"/")[2]: reason for path, reason in csv.reader(file)}
    assert reasons.keys() == {b"path", b"broken.mp4", b"fifo.mp4", b"loop.mp4", b"mute.mp4", b"blind.mp4", *bad} and all(reasons.values())
    assert json.loads((tmp_path / "run" / "results.json").read_text())["clips"] == {"train": 17, "eval": 6}


def test_compare_uses_one_teacher_and_prints_a_table(tmp_path, media, capsys):
    arguments = ["--task", "action_recognition", "--data", str(media), "--compare", "student,mnf,csc,xmkd", "--seeds", "2", "--out", str(tmp_path), "--cache", str(media.parent / "cache")]
    assert xmkd.main([a for a in TINY if a != "--quiet"] + arguments + ["--epochs", "1"]) == 0
    printed = capsys.readouterr()
    assert "no pretrained tagging network" in printed.err and "16 training and 6 evaluation clips" in printed.out
    rows = {line.split()[0]: line for line in printed.out.splitlines() if line.strip()}
    assert all("±" in rows[method] for method in ("student", "mnf", "csc", "xmkd")) and "±" not in rows["teacher"].replace("teacher:", "")
    results = json.loads((tmp_path / "results.json").read_text())
    assert [len(results["table"][m]) for m in ("teacher", "student", "mnf", "csc", "xmkd")] == [1, 2, 2, 2, 2] and results["warnings"]
    assert (tmp_path / "xmkd-s4" / "best.pt").exists()


def test_stop_and_resume_equals_one_straight_run(tmp_path, media):
    common = [*TINY, "--data", str(media), "--teacher", "scratch", "--eval-every", "1", "--cache", str(media.parent / "cache")]
    saves, save = [], xmkd.save

    def stop(path, content):
        save(path, content)
        if path == tmp_path / "b" / "last.pt":
            saves.append(path)
            if len(saves) == 1:
                raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xmkd, "save", stop)
        assert xmkd.main([*common, "--out", str(tmp_path / "b")]) == 130
    assert xmkd.load_checkpoint(tmp_path / "b" / "last.pt")["epoch"] == 1
    assert xmkd.main([*common, "--out", str(tmp_path / "b"), "--resume"]) == 0 and xmkd.main([*common, "--out", str(tmp_path / "a")]) == 0
    a, b = (xmkd.load_checkpoint(tmp_path / name / "last.pt") for name in "ab")
    assert all(torch.equal(a[part][k], b[part][k]) for part in ("student", "filter") for k in a[part])
    rows = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in "ab"]
    assert rows[0] == rows[1] and len(rows[0]) == 2


def test_half_a_line_in_the_log_of_a_killed_run_is_dropped(tmp_path, media):
    common = [*TINY, "--data", str(media), "--method", "student", "--eval-every", "1", "--out", str(tmp_path), "--cache", str(media.parent / "cache")]
    assert xmkd.main([*common, "--epochs", "1"]) == 0
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"epoch": 2, "lr')
    assert xmkd.main([*common, "--resume"]) == 0
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]


def test_a_loader_process_that_dies_is_reported_with_its_clip(tmp_path):
    data = demo_data(tmp_path)

    def load(clip, kinds):
        if clip.id.endswith("3"):
            os.kill(os.getpid(), signal.SIGKILL)
        yield torch.zeros(9)
    store = xmkd.ClipStore(tmp_path / "new", data.store.clips, load, {"audio": 1})
    with pytest.raises(xmkd.InputError, match=r"(?s)worker .* Due were train-000\d; if memory ran out, lower --workers"):
        store.decode([(i, ("audio",)) for i in range(8)], 1, lambda done, total: None)


@stress
def test_a_run_killed_at_any_moment_and_resumed_equals_one_straight_run(tmp_path, media):
    common = [*[a for a in TINY if a != "--quiet"], "--quiet", "--data", str(media), "--teacher", "scratch", "--teacher-epochs", "2", "--eval-every", "1", "--epochs", "20", "--resume"]
    command = lambda name: [sys.executable, str(HERE / "xmkd.py"), *common, "--out", str(tmp_path / name)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begun = time.time()
    assert subprocess.run(command("straight"), env=environment).returncode == 0
    duration, delays, kills = time.time() - begun, random.Random(0), 0
    for _ in range(60):
        process = subprocess.Popen(command("killed"), env=environment)
        try:
            assert process.wait(timeout=duration * delays.uniform(0.3, 0.7) * 1.2 ** max(0, kills - 10)) == 0   # longer after ten: a machine that slows down gets there too
            break
        except subprocess.TimeoutExpired:
            process.kill(), process.wait()
            kills += 1
    assert kills >= 1 and process.returncode == 0
    a, b = (xmkd.load_checkpoint(tmp_path / name / "last.pt") for name in ("straight", "killed"))
    assert a["epoch"] == b["epoch"] == 20 and all(torch.equal(a[part][k], b[part][k]) for part in ("student", "filter") for k in a[part])
    rows = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("straight", "killed")]
    assert rows[0] == rows[1] and len(rows[0]) == 20
    metrics = [json.loads((tmp_path / name / "results.json").read_text())["metrics"] for name in ("straight", "killed")]
    assert metrics[0] == metrics[1]


def test_the_number_of_workers_changes_nothing(tmp_path, media):
    common = ["--data", str(media), "--task", "action_recognition", "--method", "student", "--out", str(tmp_path), "--cache", str(media.parent / "cache")]
    weights = []
    for workers in ("0", "1", "2", "0"):
        assert xmkd.main([*[a if b != "--workers" else workers for b, a in zip(["", *TINY], TINY)], *common]) == 0
        weights.append(xmkd.load_checkpoint(tmp_path / "last.pt")["student"])
    assert all(torch.equal(weights[0][name], other[name]) for other in weights for name in weights[0])


def test_sigterm_ends_with_143_and_the_run_can_be_resumed(tmp_path, media):
    command = [sys.executable, str(HERE / "xmkd.py"), *TINY, "--data", str(media), "--method", "student", "--epochs", "500", "--eval-every", "500", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for _ in range(600):
        if (tmp_path / "run" / "last.pt").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.terminate()
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 143 and "--resume" in printed and "Traceback" not in printed
    saved = xmkd.load_checkpoint(tmp_path / "run" / "last.pt")
    epochs = str(saved["epoch"] + 1)
    assert xmkd.main([*TINY, "--data", str(media), "--method", "student", "--eval-every", "500", "--out", str(tmp_path / "run"), "--resume"]) == 2      # 2 epochs, not 500
    torch.save({**saved, "settings": {**saved["settings"], "epochs": saved["epoch"]}}, tmp_path / "run" / "last.pt")
    arguments = [a if a != "2" or b != "--epochs" else epochs for b, a in zip(["", *TINY], TINY)]
    assert xmkd.main([*arguments, "--data", str(media), "--method", "student", "--eval-every", "500", "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert xmkd.load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == int(epochs)


def test_a_loss_that_is_not_finite_is_named_with_step_and_clips(tmp_path, media, capsys):
    common = [*TINY, "--data", str(media), "--method", "student", "--batch-size", "4", "--eval-every", "1", "--out", str(tmp_path / "run"), "--cache", str(media.parent / "cache")]
    assert xmkd.main([*common, "--epochs", "1"]) == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    step, calls = xmkd.train_step, []

    def broken(*arguments, **more):
        terms = step(*arguments, **more)
        calls.append(terms)
        return {name: value * float("nan") for name, value in terms.items()} if len(calls) == 3 else terms
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xmkd, "train_step", broken)
        assert xmkd.main([*common, "--epochs", "3", "--resume"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"not finite in step 3 of epoch 2: \{'cls': nan, 'gradient': [\d.e-]+\}; clips (train/(high|low)/\d(, )?){4}; lower --lr", error)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    calls.clear()

    def exploding(student, *rest):
        calls.append(1)
        if len(calls) == 2:                                              # a finite loss of an infinite slope
            student.cls.bias.register_hook(lambda gradient: gradient / 0)
        return step(student, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xmkd, "train_step", exploding)
        assert xmkd.main([*common, "--task", "action_recognition", "--epochs", "3", "--out", str(tmp_path / "steep")]) == 2
    assert re.search(r"not finite in step 2 of epoch 1: \{'cls': [\d.]+, 'gradient': (inf|nan)\}; clips", capsys.readouterr().err)


def test_features_go_to_the_clip_that_they_are_named_after(tmp_path):
    clip = lambda name: xmkd.Clip(name, (0,), "train")
    for name in ("train/low/3", "Deep/er/V_A_g01", "train/high/5"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.npy").touch()
    found = xmkd.find_features(tmp_path, [clip(i) for i in ("train/high/3", "train/low/3", "v_A_g01", "train/x/5", "none")])
    assert {key: os.path.relpath(path, tmp_path) for key, path in found.items()} == {
        "train/low/3": "train/low/3.npy", "v_A_g01": "Deep/er/V_A_g01.npy", "train/x/5": "train/high/5.npy"}


def test_a_folder_in_use_is_refused_and_lack_of_memory_or_disk_is_named(tmp_path, media, capsys, monkeypatch):
    common = [*TINY, "--data", str(media), "--method", "student", "--epochs", "1", "--out", str(tmp_path), "--cache", str(media.parent / "cache")]
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert xmkd.main(common) == 2 and "being written by another run" in capsys.readouterr().err
    for error, says in ((torch.OutOfMemoryError("CUDA out of memory"), "lower --batch-size"), (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "lower --batch-size"),
                        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(xmkd, "train_step", lambda *a: (_ for _ in ()).throw(error))
            assert xmkd.main(common) == 2 and says in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(xmkd, "train_step", lambda *a: (_ for _ in ()).throw(RuntimeError("a bug")))
        xmkd.main(common)
    for suffix in ("pt", "npy", "json"):                                # a disk of no space at all
        with pytest.raises(OSError, match=rf"/dev/full|a.{suffix} cannot be written, [\d.,]+ MB are free there"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "open", lambda *a: open("/dev/full", "wb", buffering=0))
            xmkd.write(tmp_path / f"a.{suffix}", np.zeros(9000) if suffix == "npy" else [1])
        assert not (tmp_path / f"a.{suffix}").exists()
    xmkd.save(tmp_path / "a.json", {"whole": 1})
    with pytest.raises(TypeError):
        xmkd.save(tmp_path / "a.json", {"half": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"whole": 1} and not [*tmp_path.glob("*.part")]


def test_each_clip_gets_its_own_embedding(tmp_path, media):
    cache = media.parent / "cache"
    arguments = [*TINY, "--task", "action_recognition", "--data", str(media), "--teacher", "scratch", "--cache", str(cache), "--out", str(tmp_path / "run")]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xmkd, "train_student", lambda *a: seen.append(a) or {"metrics": {}})
        assert xmkd.main(arguments) == 0
        files = [tmp_path / "features" / path.relative_to(media).with_suffix(".npy") for path in sorted(media.rglob("*.mp4"))]
        for k, file in enumerate(files):
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, np.array([k, 1.0]))
        assert xmkd.main([a if a not in ("--teacher", "scratch") else {"--teacher": "--teacher-features", "scratch": str(tmp_path / "features")}[a] for a in arguments]) == 0
    (job, _, _, teacher, _), (_, _, _, given, _) = seen
    job = job._replace(spec=job.spec._replace(kind="audio"))
    file, = [f for f in cache.glob("teacher-*/best.pt") if xmkd.load_checkpoint(f)["network"]["kind"] == "audio"
             and torch.load(f.parent / "embeddings.pt")["pooled"].shape[0] == len(job.data.store.clips)][-1:]
    network = xmkd.restore(job, "data", xmkd.load_checkpoint(file))
    for i in job.data.train[::5]:
        assert torch.allclose(xmkd.predict(job, network, [i])[1][0], teacher[i], atol=1e-4), job.data.store.clips[i].id
        assert str(files[int(given[i, 0])]).endswith(job.data.store.clips[i].id + ".npy")
    item = xmkd.Views(job.data, job.spec, "train", teacher)[job.data.train[2], 0]
    assert torch.equal(item[3], teacher[job.data.train[2]]) and item[2] == job.data.store.clips[job.data.train[2]].labels[0]


def test_settings_reach_every_step(tmp_path, media):
    steps, step = [], xmkd.train_step

    def record(*arguments):
        steps.append((type(arguments[1]).__name__, [round(g["lr"], 7) for g in arguments[2].param_groups], arguments[6:], getattr(arguments[1], "offset", None)))
        return step(*arguments)
    common = [*TINY, "--task", "action_recognition", "--data", str(media), "--teacher", "scratch", "--cache", str(media.parent / "cache"), "--epochs", "4",
              "--csc-offset", "0.4", "--margin", "0.3", "--sparsity", "0.01", "--lr", "1e-3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xmkd, "train_step", record)
        for method in ("xmkd", "mnf", "csc", "student"):
            steps.clear()
            assert xmkd.main([*common, "--method", method, "--out", str(tmp_path / method)]) == 0
            mine = [s for s in steps if s[0] != "NoneType"] or steps[-4:]              # less those of a teacher that was not cached
            helper = {"xmkd": "ModalityNoiseFilter", "mnf": "ModalityNoiseFilter", "csc": "Distiller", "student": "NoneType"}[method]
            assert [s[0] for s in mine] == [helper] * 4
            factors = {"ModalityNoiseFilter": [1, 0.2], "Distiller": [1, 1], "NoneType": [1]}[helper]
            assert [s[1] for s in mine] == [[round(1e-3 * f * (0.1 if epoch == 4 else 1), 7) for f in factors] for epoch in (1, 2, 3, 4)]
            assert all(s[2] == (0.4, 0.3, 0.01, method != "mnf") for s in mine) and (method != "csc" or mine[0][3] == 0.4)


def test_retrieval_ranks_the_training_clips(tmp_path, monkeypatch):
    data = demo_data(tmp_path)
    for i in (10, 11):
        data.store.clips[i] = data.store.clips[i]._replace(labels=(3,))
    pooled = torch.eye(10)[[*range(10), 3, 5]]                          # of two queries of class 3 one lies on a clip of class 5
    monkeypatch.setattr(xmkd, "predict", lambda job, network, clips, *a, **k: (torch.rand(len(clips), 10), pooled[clips]))
    job = xmkd.Job({"task": "video_retrieval"}, data, xmkd.ViewSpec("video"), xmkd.Console(quiet=True))
    assert xmkd.final_metrics(job, None)["R@1"] == 0.5


@pytest.mark.parametrize("kind", ["audio", "video"])
def test_bf16_stays_near_float32_and_the_losses_keep_float32(kind):
    terms = {}
    for amp in ("none", "bf16"):
        torch.manual_seed(0)
        network = xmkd.equip(xmkd.make_network(kind, 5, 8), {"device": "cpu", "amp": amp, "compile": False})
        noise_filter, inputs = xmkd.ModalityNoiseFilter(5, 64), rand(8, 64, 64) if kind == "audio" else rand(8, 3, 4, 32, 32)
        features = network(inputs)
        assert {part.dtype for part in features} == {torch.float32} and type(features) is xmkd.Features
        last = network.cls if kind == "video" else network.fc_audioset
        assert torch.allclose(features.logits, F.linear(features.pooled, last.weight, last.bias), atol=1e-6)     # of 8 bits they would tie
        terms[amp] = xmkd.train_step(network, noise_filter, xmkd.make_optimizer(network, noise_filter), inputs, rand(8, 64), torch.arange(8) % 5)
    differences = [abs(float(terms["bf16"][k] - terms["none"][k])) for k in terms["none"]]
    assert 0 < max(differences) < 0.05 and all(value.dtype == torch.float32 for value in terms["bf16"].values())


@pytest.mark.skipif(not any(shutil.which(compiler) for compiler in ("g++", "clang++")), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_networks_equal_eager_ones():
    torch.manual_seed(0)
    eager, inputs = xmkd.make_network("audio", 5, 2, stages=1), rand(3, 32, 64)
    compiled = xmkd.equip(xmkd.make_network("audio", 5, 2, stages=1), {"device": "cpu", "amp": "none", "compile": True})
    compiled.load_state_dict(eager.state_dict())
    for network in (eager, compiled):
        sum(part.square().sum() for part in network(inputs)).backward()
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(eager(inputs), compiled(inputs)))
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-4) for a, b in zip(eager.parameters(), compiled.parameters()))


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import xmkd
torch.set_default_dtype(torch.float64)
if xmkd.WORLD > 1:
    dist.init_process_group("gloo")
results = {}
for kind in ("audio", "video"):
    torch.manual_seed(0)
    network, noise_filter = xmkd.make_network(kind, 5, 4), xmkd.ModalityNoiseFilter(5, 32, teacher_dim=20)
    optimizer = xmkd.make_optimizer(network, noise_filter)
    trained = xmkd.distribute(network, noise_filter, optimizer) if xmkd.WORLD > 1 else network
    for step in range(3):
        inputs = torch.rand(8, 64, 64) if kind == "audio" else torch.rand(8, 3, 4, 32, 32)
        teacher, labels = torch.rand(8, 20), (torch.rand(8, 5) > 0.5).double() if kind == "audio" else torch.arange(8) % 3
        part = slice(xmkd.RANK * 8 // xmkd.WORLD, (xmkd.RANK + 1) * 8 // xmkd.WORLD)
        terms = xmkd.train_step(trained, noise_filter, optimizer, inputs[part], teacher[part], labels[part])
    results[kind] = {**terms, **network.state_dict(), **noise_filter.state_dict()}
torch.set_default_dtype(torch.float32)
torch.manual_seed(0)
network, helper = xmkd.equip(xmkd.make_network("audio", 5, 4), {"device": "cpu", "amp": "bf16", "compile": False}), xmkd.Distiller("crd", 5, 32, 20)
optimizer = xmkd.make_optimizer(network, helper, filter_lr=1)
trained = xmkd.distribute(network, helper, optimizer) if xmkd.WORLD > 1 else network
inputs, teacher, labels = torch.rand(8, 64, 64), torch.rand(8, 20), torch.arange(8) % 3
part = slice(xmkd.RANK * 8 // xmkd.WORLD, (xmkd.RANK + 1) * 8 // xmkd.WORLD)
for step in range(3):
    terms = xmkd.train_step(trained, helper, optimizer, inputs[part], teacher[part], labels[part])
results["bf16"] = terms
copies = [xmkd.gather(value[None]) for module in (network, helper) for value in module.state_dict().values() if value.is_floating_point()]
assert all(torch.equal(copy[0], other) for copy in copies for other in copy)            # no process has drifted
if xmkd.RANK == 0:
    torch.save(results, sys.argv[2])
if xmkd.WORLD > 1:
    dist.destroy_process_group()
"""


def torchrun(*arguments, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_train_as_one_on_the_joined_batch(tmp_path):
    (tmp_path / "steps.py").write_text(TWO_PROCESSES)
    for processes in (1, 2):
        result = torchrun(tmp_path / "steps.py", HERE, tmp_path / f"{processes}.pt", processes=processes)
        assert result.returncode == 0, result.stderr
    one, two = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, 2))
    for kind in ("audio", "video"):
        assert one[kind].keys() == two[kind].keys() and {"csc", "triplet", "cls"} <= one[kind].keys()
        assert all(torch.allclose(value.double(), two[kind][name].double(), rtol=1e-9, atol=1e-10) for name, value in one[kind].items()), kind
    assert one["bf16"].keys() == {"cls", "distill"} and all(value == pytest.approx(two["bf16"][name].item(), abs=0.05) for name, value in one["bf16"].items())


def test_torchrun_trains_evaluates_each_clip_once_and_one_process_goes_on(tmp_path, media):
    common = ["--data", str(media), "--task", "action_recognition", "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), "--teacher", "scratch"]
    tiny = [a if (b, a) != ("--width", "4") else "2" for b, a in zip(["", *TINY], TINY)]
    result = torchrun(HERE / "xmkd.py", *tiny, *common)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["clips"] == {"train": 16, "eval": 6} and len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 1
    assert [*csv.reader((tmp_path / "run" / "skipped.csv").open())][1:] == [[str(media / "train/low/broken.mp4"), "empty file (0 bytes)"]]
    assert xmkd.main(["--eval", str(tmp_path / "run" / "best.pt"), "--out", str(tmp_path / "eval"), "--cache", str(tmp_path / "cache"), "--workers", "0", "--quiet"]) == 0
    again = json.loads((tmp_path / "eval" / "results.json").read_text())["metrics"]
    assert again == pytest.approx(results["metrics"], abs=1e-6)
    longer = [a if (b, a) != ("--epochs", "2") else "3" for b, a in zip(["", *tiny], tiny)]
    assert xmkd.main([*longer, *common, "--resume"]) == 0
    assert "resumed with 1 processes after 2" in json.loads((tmp_path / "run" / "results.json").read_text())["warnings"][-1]
    refused = torchrun(HERE / "xmkd.py", *tiny, *common, "--batch-size", "7")
    assert refused.returncode and "] error: --batch-size 7 is not a multiple of the 2 processes" in refused.stderr
    evaluated = torchrun(HERE / "xmkd.py", "--eval", tmp_path / "run" / "best.pt", "--out", tmp_path / "eval", "--cache", tmp_path / "cache", "--workers", "0", processes=3)
    assert evaluated.returncode == 0 and json.loads((tmp_path / "eval" / "results.json").read_text())["metrics"] == pytest.approx(again, abs=1e-6)


def test_a_run_goes_on_with_its_own_teacher_only_and_its_checkpoint_stands_alone(tmp_path, media, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in media.rglob("*.mp4"):
        file = tmp_path / "features" / path.relative_to(media).with_suffix(".npy")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.random.default_rng(len(file.name)).random(20))
    common = [*TINY, "--task", "action_recognition", "--data", str(media), "--out", "run", "--cache", "cache"]
    assert xmkd.main([*common, "--teacher-features", "features"]) == 0
    assert xmkd.main([*common, "--epochs", "3", "--resume"]) == 2 and "--resume: teacher_features was 'features'" in capsys.readouterr().err
    for path in (tmp_path / "features").rglob("*.npy"):
        np.save(path, np.load(path) + 1)
    assert xmkd.main([*common, "--epochs", "3", "--resume", "--teacher-features", "features"]) == 2 and "other teacher embeddings" in capsys.readouterr().err
    assert xmkd.main([*common, "--seeds", "2", "--resume", "--teacher-features", "features"]) == 2 and "run holds a single run" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "features")
    assert xmkd.main(["--predict", str(media / "val"), "--checkpoint", "run/best.pt", "--workers", "0"]) == 0
    assert xmkd.main(["--eval", "run/best.pt", "--workers", "0", "--quiet"]) == 0
    assert json.loads((tmp_path / "runs" / f"action_recognition-{media.name}-eval-xmkd-s3" / "results.json").read_text())["method"] == "xmkd"


def test_a_scratch_teacher_can_be_evaluated_and_a_new_run_leaves_nothing_of_the_old(tmp_path, media, capsys):
    common = [*TINY, "--epochs", "1", "--task", "action_recognition", "--data", str(media), "--teacher", "scratch", "--out", str(tmp_path), "--cache", str(tmp_path / "cache")]
    assert xmkd.main(common) == 0
    teacher, = tmp_path.glob("cache/teacher-*/best.pt")
    assert xmkd.main(["--eval", str(teacher), "--data", str(media), "--out", str(tmp_path / "eval"), "--workers", "0", "--quiet"]) == 0
    assert xmkd.main(["--eval", str(teacher), "--task", "action_recognition"]) == 2 and "is a checkpoint of --task audio_tagging" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xmkd, "train_epoch", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert xmkd.main([*common, "--csc-offset", "0.1"]) == 130
    assert not [name for name in ("best.pt", "last.pt", "results.json") if (tmp_path / name).exists()]


def test_two_runs_that_share_a_cache_make_one_teacher(tmp_path, media, monkeypatch):
    arguments, told = [*TINY, "--task", "action_recognition", "--data", str(media), "--teacher", "scratch", "--cache", str(tmp_path / "cache")], []
    monkeypatch.setattr(xmkd, "train_student", lambda *a: {"metrics": {}})
    assert xmkd.main([*arguments, "--out", str(tmp_path / "a")]) == 0
    kept, = tmp_path.glob("cache/teacher-*/embeddings.pt")
    made = kept.rename(tmp_path / "made")
    monkeypatch.setattr(xmkd, "train_teacher", lambda *a: pytest.fail("trained again"))
    with (kept.parent / ".lock").open("w") as lock:                     # as another run would
        fcntl.flock(lock, fcntl.LOCK_EX)
        def finish(console, text):
            if "waits for another run" in text:
                told.append(str(made.rename(kept).parent) in text)
                fcntl.flock(lock, fcntl.LOCK_UN)
        monkeypatch.setattr(xmkd.Console, "say", finish)
        assert xmkd.main([*arguments, "--out", str(tmp_path / "b")]) == 0 and told == [True]


def test_a_process_that_fails_does_not_wait_for_the_others(monkeypatch, tmp_path):
    ended = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append(True))
    assert xmkd.main(["--data", str(tmp_path / "none")]) == 2 and not ended
    monkeypatch.setattr(xmkd, "run", lambda given: None)
    assert xmkd.main([]) == 0 and ended


def test_bf16_on_a_cpu_is_refused(capsys):
    assert xmkd.main(["--amp", "bf16", "--device", "cpu"]) == 2 and "--amp bf16 needs a GPU" in capsys.readouterr().err


def test_one_process_that_fails_ends_all_with_its_message(tmp_path, media):
    (tmp_path / "main.py").write_text(f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import xmkd
step, calls = xmkd.train_step, []
def broken(*arguments):
    calls.append(1)
    if xmkd.RANK == 1 and len(calls) == 3:
        raise xmkd.InputError("the second process has had enough")
    return step(*arguments)
xmkd.train_step = broken
sys.exit(xmkd.main())
""")
    begun = time.time()
    result = torchrun(tmp_path / "main.py", *TINY, "--batch-size", "4", "--data", media, "--method", "student", "--out", tmp_path / "run", "--cache", tmp_path / "cache")
    assert result.returncode and "[1] error: the second process has had enough" in result.stderr and time.time() - begun < 120
    assert not [*tmp_path.rglob("*.part")] and not (tmp_path / "run" / "results.json").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, media):
    """Folders of one run of xmkd on the media and one on the demo, whose students see video, with their caches."""
    root = tmp_path_factory.mktemp("trained")
    common = [*TINY, "--epochs", "1", "--task", "video_retrieval", "--teacher", "scratch"]
    assert xmkd.main([*common, "--data", str(media), "--out", str(root / "media")]) == 0
    assert xmkd.main([*common, "--method", "xmkd", "--frames", "2", "--out", str(root / "demo")]) == 0
    return root


def test_predict_gives_the_scores_of_an_evaluation_file_by_file(trained, media, capsys):
    files, checkpoint = sorted(map(str, media.glob("val/*/*.mp4"))), str(trained / "media" / "best.pt")
    assert xmkd.main(["--predict", str(media / "val"), "--checkpoint", checkpoint, "--json", "--workers", "0"]) == 0
    results = json.loads(capsys.readouterr().out)
    saved = xmkd.load_checkpoint(checkpoint)
    layout, _, settings = xmkd.settle({"eval": checkpoint, "workers": 0, "quiet": True}, saved)
    data = xmkd.open_data(layout, settings, trained / "media" / "cache", trained, xmkd.Console(quiet=True))
    job = xmkd.Job(settings, data, xmkd.view_spec(settings), xmkd.Console(quiet=True))
    scores, _ = xmkd.predict(job, xmkd.restore(job, "eval", saved), data.eval)
    expected = {data.store.clips[i].video: dict(zip(data.classes, row.tolist())) for i, row in zip(data.eval, scores)}
    assert [r["file"] for r in results] == files and expected.keys() == set(files)
    for result in results:
        top = {best["name"]: best["score"] for best in result["top"]}
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert top == pytest.approx(expected[result["file"]], abs=2e-6)


def test_predict_says_which_file_lacks_the_stream_and_names_the_others_tags(trained, media, tmp_path, capsys):
    sound, odd = tmp_path / "sound only.wav", tmp_path / "-a clip with spaces.mp4"
    encode(sound, video=False)
    shutil.copy(media / "val" / "low" / "0.mp4", odd)
    command = ["--checkpoint", str(trained / "media" / "best.pt"), "--workers", "0", "--topk", "1"]
    assert xmkd.main(["--predict", str(odd), str(sound), "nowhere.mp4", *command]) == 2
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert re.fullmatch(r"  (0\.[5-9]\d\d|1\.000)  (high|low)", lines[lines.index(str(odd)) + 1])             # of two classes the likelier
    assert lines[lines.index(str(sound)) + 1] == "  error: no video stream" and "  error: no such file" in lines[-1]
    assert printed.err == "error: 2 of 3 files could not be used; the checkpoint is one for video\n"
    assert xmkd.main(["--predict", str(tmp_path), *command]) == 0                               # a folder: what has the stream
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("/")] == [str(odd)]


def test_predict_prints_any_file_name_and_wipes_the_progress_line(trained, tmp_path, capsys, monkeypatch):
    odd = tmp_path / "\xfcn\xef\udcff.mp4"                                                      # UTF-8, then a byte that is none
    odd.write_bytes(b"no media")
    command = ["--predict", str(odd), "--checkpoint", str(trained / "media" / "best.pt"), "--workers", "0"]
    assert xmkd.main([*command, "--json"]) == 2
    printed = capsys.readouterr().out
    assert printed.isascii() and json.loads(printed)[0]["file"] == str(odd)
    process = subprocess.run([sys.executable, xmkd.__file__, *command], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert process.returncode == 2 and "ünï\\udcff.mp4\n  error: cannot be decoded" in process.stdout.decode()
    shutil.copy(xmkd.__file__, tmp_path / "clip.mp4")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert xmkd.main(["--predict", str(tmp_path / "clip.mp4"), *command[2:]]) == 2
    assert f"\r\x1b[K{tmp_path / 'clip.mp4'}\n" in capsys.readouterr().out


def test_the_gallery_ranks_its_clips_and_leaves_the_file_itself_out(trained, media, capsys):
    file = media / "val" / "low" / "1.mp4"
    assert xmkd.main(["--predict", str(file), "--gallery", str(media / "val"), "--checkpoint", str(trained / "media" / "best.pt"), "--json", "--topk", "50", "--workers", "0"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert {best["name"] for best in result["top"]} == {str(p) for p in media.glob("val/*/*.mp4")} - {str(file)}
    scores = [best["score"] for best in result["top"]]
    assert scores == sorted(scores, reverse=True) and 0.9 < scores[0] <= 1
    assert xmkd.main(["--predict", str(file), "--gallery", str(media / "train" / "low" / "broken.mp4"), "--checkpoint", str(trained / "media" / "best.pt"), "--workers", "0"]) == 2
    assert re.search("1 clips are left out of the gallery; the first: .*empty file.*\nerror: --gallery .* holds no clip with video", capsys.readouterr().err)


def test_long_files_are_scored_in_windows_and_averaged(trained, media, tmp_path, capsys):
    encode(tmp_path / "long.mp4", seconds=9.0, tone=500.0, fps=8)
    checkpoint = str(trained / "media" / "best.pt")
    saved = xmkd.load_checkpoint(checkpoint)
    settings = saved["settings"]
    frames = xmkd.decode_video(tmp_path / "long.mp4", fps=settings["fps"], size=round(settings["size"] * 128 / 112))
    windows = xmkd.sliding_windows(len(frames), settings["frames"], settings["frames"])
    assert len(windows) > 4
    network = xmkd.make_network(**saved["network"])
    network.load_state_dict(saved["student"])
    side = frames.shape[-2]
    x = (frames.shape[-1] - side) / 2
    prepare = xmkd.Prepare(settings["size"])
    box = torch.tensor([[x, 0.0, x + side, side]])
    stream = xmkd.pack_frames(frames)
    with torch.no_grad():
        each = [network.eval()(prepare(xmkd.read_frames(stream, w)[None], box)).logits.softmax(1)[0] for w in windows]
    assert xmkd.main(["--predict", str(tmp_path / "long.mp4"), "--checkpoint", checkpoint, "--json", "--workers", "0"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert {best["name"]: best["score"] for best in result["top"]} == pytest.approx(dict(zip(["high", "low"], torch.stack(each).mean(0).tolist())), abs=2e-6)


@pytest.mark.parametrize("data", ["demo", "media"])
def test_explain_draws_clips_batch_and_groups(trained, tmp_path, capsys, data):
    folder = tmp_path / "run"
    shutil.copytree(trained / data, folder)
    weights = (folder / "best.pt").read_bytes()
    capsys.readouterr()
    assert xmkd.main(["--explain", "2", "--checkpoint", str(folder / "best.pt"), "--out", str(folder), "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    sheets = sorted((folder / "explain").glob("*.png"))
    assert [s.name for s in sheets][:1] == ["batch.png"] and len(sheets) == 4 and sum(s.name.startswith("clip-") for s in sheets) == 2
    for sheet in sheets:
        with av.open(str(sheet)) as container:
            picture = next(container.decode(video=0)).to_ndarray(format="rgb24")
        assert 900 < picture.shape[1] <= 1056 and picture.std() > 20                            # not blank
    names = ("matched and clean", "matched and noisy", "mismatched") if data == "demo" else ("training clips", "evaluation clips")
    counts = [list(map(int, re.findall(rf"{name} +(\d+) clips", printed))) for name in names]
    assert all(len(c) == 2 and c[0] == c[1] for c in counts) and sum(c[0] for c in counts) == (480 if data == "demo" else 22)
    assert (folder / "best.pt").read_bytes() == weights


def test_attention_lands_on_the_position_that_it_is_for():
    frames = torch.zeros(3, 16, 112, 112)                                                       # 2 x 7 x 7 positions
    attention = torch.zeros(98)
    attention[49 + 2 * 7 + 5] = 1.0                                                             # second half, row 2, column 5
    picture = xmkd.draw_attention(frames, attention)
    shaded = picture[:, picture.shape[1] // 2:, :1054].mean(0)                                  # two rows of eight frames of 128 pixels
    lit = ((shaded > 0.6) & (shaded < 0.95)).nonzero()
    y, x = (lit[:, 0] - 132) % 130, lit[:, 1] % 130
    assert lit[:, 0].min() > 130 and len(lit) > 8 * 15 * 15
    assert (y.median() / 130).item() == pytest.approx(2.5 / 7, abs=0.08) and (x.median() / 130).item() == pytest.approx(5.5 / 7, abs=0.05)
    logmel, attention = torch.rand(101, 64), torch.zeros(24)                                    # 6 x 4 positions
    attention[4 * 4 + 3] = 1.0                                                                  # fifth of six times, highest of four pitches
    picture = xmkd.draw_attention(logmel, attention)
    shaded = picture[:, picture.shape[1] // 2:].mean(0)
    y, x = (shaded == shaded[shaded < 1].max()).nonzero().float().mean(0).tolist()
    assert y / shaded.shape[0] < 0.3 and x / shaded.shape[1] == pytest.approx(4.5 / 6, abs=0.09)
    logmel = torch.zeros(111, 64)
    logmel[79:81] = 1.0                                                                         # where the fifth of six positions ends
    picture = xmkd.draw_attention(logmel, torch.full((24,), 1 / 24))
    assert picture[0, 100].nonzero().float().mean() / picture.shape[2] == pytest.approx(5 / 6, abs=0.005)
    assert xmkd.draw_attention(torch.full((100, 64), -100.0), attention).isfinite().all()       # silence


def test_a_checkpoint_without_a_filter_or_with_another_teacher_is_not_explained(trained, tmp_path, capsys):
    saved = torch.load(trained / "demo" / "best.pt", weights_only=True)
    torch.save({**saved, "method": "student", "filter": {}}, tmp_path / "student.pt")
    assert xmkd.main(["--explain", "1", "--checkpoint", str(tmp_path / "student.pt"), "--cache", str(trained / "demo" / "cache"), "--out", str(tmp_path / "a"), "--workers", "0"]) == 2
    assert "is of student, without a filter; give one of xmkd or mnf" in capsys.readouterr().err
    wide = {key: F.pad(value, (0, 3)) if value.ndim == 2 else value for key, value in saved["filter"].items()}
    torch.save({**saved, "filter": wide}, tmp_path / "wide.pt")
    assert xmkd.main(["--explain", "1", "--checkpoint", str(tmp_path / "wide.pt"), "--cache", str(trained / "demo" / "cache"), "--out", str(tmp_path / "a"), "--workers", "0"]) == 2
    assert "does not fit embeddings of" in capsys.readouterr().err


def test_an_explanation_with_another_teacher_of_the_same_width_is_warned_about(trained, tmp_path, capsys):
    saved = torch.load(trained / "demo" / "best.pt", weights_only=True)
    n, width, size = saved["teacher"]
    torch.save({**saved, "teacher": [n, width, 2 * size]}, tmp_path / "best.pt")
    command = ["--cache", str(trained / "demo" / "cache"), "--workers", "0", "--explain", "1", "--checkpoint"]
    assert xmkd.main([*command, str(tmp_path / "best.pt")]) == 0
    assert "was trained with other teacher embeddings than these" in capsys.readouterr().err
    assert (tmp_path / "explain" / "batch.png").exists()                                        # beside the checkpoint
    torch.save(saved, tmp_path / "best.pt")
    assert xmkd.main([*command, str(tmp_path / "best.pt")]) == 0 and capsys.readouterr().err == ""


def test_a_fingerprint_reads_a_thousand_embeddings_of_a_million_and_tells_teachers_apart():
    teacher = rand(1, 4).expand(10 ** 6, 4)                                                     # takes no memory, like a file that is mapped
    assert xmkd.fingerprint(None) == [] and xmkd.fingerprint(teacher)[:2] == [10 ** 6, 4]
    assert xmkd.fingerprint(rand(10, 4))[2] == pytest.approx(rand(10, 4).mean().item())
    assert not np.allclose(xmkd.fingerprint(rand(5000, 4)), xmkd.fingerprint(rand(5000, 4) * 1.01), rtol=1e-3)


def test_a_reader_that_has_had_enough_is_no_error(trained, media):
    command = [sys.executable, str(HERE / "xmkd.py"), "--predict", str(media / "val"), "--checkpoint", str(trained / "media" / "best.pt"), "--workers", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


def test_groups_tell_how_often_one_of_the_first_is_higher():
    first = torch.tensor([True, True, False, False])
    text, picture = xmkd.draw_groups({"one": first, "other": ~first}, {"size": torch.tensor([3.0, 1.0, 2.0, 0.0])})
    assert "other                  2 clips  1.000 ± 1.000  lower than one of the first group with chance 0.75" in text
    assert picture.shape[0] == 3 and picture.min() == 0 and picture.max() == 1


def test_curves_for_tensorboard_are_those_of_the_log_and_not_needed(tmp_path, media, monkeypatch, capsys):
    drawn = []
    class Board:
        def __init__(self, folder, purge_step): drawn.append((folder, purge_step))
        def add_scalar(self, *point): drawn.append(point)
        def close(self): drawn.append("closed")
    class Module:
        SummaryWriter = Board
    command = [*TINY, "--data", str(media), "--method", "student", "--tensorboard", "--cache", str(media.parent / "cache")]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Module)
    assert xmkd.main([*command, "--out", str(tmp_path / "a")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert drawn == [(str(tmp_path / "a"), 1), *((k, v, row["epoch"]) for row in rows for k, v in row.items()), "closed"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)                           # not installed
    assert xmkd.main([*command, "--out", str(tmp_path / "b")]) == 0
    assert "warning: no curves: " in capsys.readouterr().err and (tmp_path / "b" / "best.pt").exists()


@pytest.mark.parametrize("arguments, says", [
    ("--predict a.mp4", "--predict needs --checkpoint"), ("--explain 3", "--explain needs --checkpoint"),
    ("--checkpoint best.pt", "--checkpoint needs --predict or --explain"), ("--json", "--json needs --predict"),
    ("--gallery . --explain 2 --checkpoint {}", "--gallery needs --predict"),
    ("--predict a.mp4 --explain 2 --checkpoint {}", "--predict and --explain exclude each other"),
    ("--predict a.mp4 --checkpoint {} --resume", "--predict and --resume exclude each other"),
    ("--predict a.mp4 --checkpoint {} --task audio_tagging", "is a checkpoint of --task action_recognition, not of audio_tagging"),
    ("--predict /etc --checkpoint {}", "no media file with video under /etc")])
def test_modes_that_make_no_sense_are_refused(trained, capsys, monkeypatch, tmp_path, arguments, says):
    path = tmp_path / "best.pt"
    shutil.copy(trained / "media" / "best.pt", path)
    monkeypatch.chdir(tmp_path)
    assert xmkd.main(arguments.format(path).split()) == 2
    assert says in capsys.readouterr().err


def test_benchmark_prints_loader_step_and_epoch(tmp_path, capsys):
    assert xmkd.main(["--benchmark", "--task", "action_recognition", "--width", "2", "--workers", "0", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"loader  [\d,]+ clips/s by 0 workers\nstep    [\d.,]+ ms for 8 clips, [\d.,]+ clips/s: views [\d.]+, forward [\d.]+, losses and "
                     r"backward [\d.]+, optimizer [\d.]+\n +\S+ TFLOP/s .* peak memory [\d.]+ GiB\nepoch +[\d.]+ min for UCF51 \(4,892 clips\)\non ", printed), printed


def test_the_student_memorises_eight_clips(tmp_path):
    data = demo_data(tmp_path, clips=10)
    torch.manual_seed(0)
    network, prepare = xmkd.make_network("video", 10, 8), xmkd.Prepare(24)
    noise_filter = xmkd.ModalityNoiseFilter(10, 64, teacher_dim=16)
    optimizer = xmkd.make_optimizer(network, noise_filter, lr=3e-3)
    views, boxes, _ = xmkd.join_views([xmkd.Views(data, xmkd.ViewSpec("video", 6, 24), "test")[i, 0] for i in range(8)])
    for _ in range(60):
        xmkd.train_step(network, noise_filter, optimizer, prepare(views, boxes), rand(8, 16), data.labels(range(8)))
    assert network.eval()(prepare(views, boxes)).logits.argmax(1).tolist() == list(range(8))


@pytest.mark.parametrize("arguments, says", [
    (["--data", "/nowhere"], "/nowhere is not a folder"), (["--data", "{}"], "AudioSet .*UCF-101 .*train/<label>"), (["--method", "xmkd", "--compare", "csc"], "exclude"),
    (["--compare", "student,best"], "'best' is no method"), (["--epochs", "0"], "0 is not a whole number from 1"), (["--noise", "2"], "2 is not a number from 0 to 1"),
    (["--bogus"], "unrecognized arguments: --bogus"), (["--eval", "{}/none.pt"], "no readable checkpoint"), (["--eval", "{}/none.pt", "--resume"], "no readable checkpoint"),
    (["--teacher", "{}/none.pt"], "no readable checkpoint"), (["--teacher-features", "{}/none"], "--teacher-features .*/none is not a folder")])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, says):
    assert xmkd.main([*TINY, *(a.format(tmp_path) for a in arguments), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(says, error) and error.startswith("error: ") and error.count("\n") == 1


def test_data_that_cannot_be_used_is_refused(tmp_path, media, capsys):
    def fails(says, *arguments):
        assert xmkd.main([*TINY, "--out", str(tmp_path / "out"), *arguments]) == 2
        assert re.search(says, capsys.readouterr().err)
    fails("split of .* is empty", "--data", str(audioset(tmp_path / "soundonly")))
    root = audioset(tmp_path / "broken", files=["aaaaaaaaaa0.mp4", "bbbbbbbbbb0.mp4"])
    fails("unreadable, more than the share --max-skipped 0.2; the first: .*aaaaaaaaaa0", "--data", str(root))
    fails("several; use --task audio_tagging", "--data", str(root), "--task", "action_recognition")
    (tmp_path / "half" / "train" / "a").mkdir(parents=True)
    encode(tmp_path / "half" / "train" / "a" / "1.mp4")
    fails("eval split of .* is empty", "--data", str(tmp_path / "half"))
    run = tmp_path / "run"
    common = ["--task", "action_recognition", "--data", str(media), "--cache", str(media.parent / "cache")]
    assert xmkd.main([*TINY, *common, "--method", "student", "--epochs", "1", "--out", str(run)]) == 0
    fails("is a checkpoint of --task action_recognition, not of audio_tagging", "--eval", str(run / "best.pt"), "--task", "audio_tagging")
    (tmp_path / "one" / "val" / "other").mkdir(parents=True)
    encode(tmp_path / "one" / "val" / "other" / "1.mp4")
    fails("knows 2 classes .* has 1 ", "--eval", str(run / "best.pt"), "--data", str(tmp_path / "one"))
    fails("network for video; --task action_recognition needs one for audio", *common, "--teacher", str(run / "best.pt"))
    fails("--resume: lr was 0.0003 .* and is 0.01 now", *common, "--method", "student", "--out", str(run), "--resume", "--lr", "0.01")


def test_a_checkpoint_can_teach_the_other_modality(tmp_path, media):
    common = [*TINY, "--data", str(media), "--epochs", "1", "--cache", str(media.parent / "cache")]
    assert xmkd.main([*common, "--task", "action_recognition", "--method", "student", "--out", str(tmp_path / "video")]) == 0
    assert xmkd.main([*common, "--width", "6", "--teacher", str(tmp_path / "video" / "best.pt"), "--out", str(tmp_path / "audio")]) == 0
    assert xmkd.load_checkpoint(tmp_path / "audio" / "best.pt")["filter"]["adapter.weight"].shape == (48, 32)     # teacher 32-d, student 48-d


def release(root, features=True):
    """The authors' data release in small: annotation.json, <id>.hdf5, <Class>/<id>.npy."""
    h5py = pytest.importorskip("h5py")
    database = {f"v_{label}_g{i:02}_c01": {"subset": "training" if i < 8 else "validation", "label": label} for label in ("Zoo", "Ant") for i in range(11)}
    root.mkdir()
    (root / "annotation.json").write_text(json.dumps({"labels": ["Zoo", "Ant"], "database": database}))
    for k, (name, entry) in enumerate(database.items()):
        frames = torch.full((5, 3, 24, 32), 40 if entry["label"] == "Zoo" else 200, dtype=torch.uint8)
        with h5py.File(root / f"{name}.hdf5", "w") as file:
            video = file.create_dataset("video", (5,), dtype=h5py.special_dtype(vlen=np.uint8))
            packed = xmkd.pack_frames(frames)
            for i, (start, end) in enumerate(itertools.pairwise(packed[:24].view(np.uint32))):
                video[i] = packed[start + 1:end]                                    # less the byte for the colour matrix
        if features:
            (root / entry["label"]).mkdir(exist_ok=True)
            np.save(root / entry["label"] / f"{name}.npy", rand(20, seed=k).numpy())
    return root


def test_the_authors_data_release_trains_as_it_is(tmp_path, capsys):
    root = release(tmp_path / "ucf51")
    (root / "Zoo" / "v_Zoo_g03_c01.npy").unlink()
    (root / "v_Ant_g02_c01.hdf5").write_bytes(b"no hdf5")
    out = tmp_path / "run"
    assert xmkd.main([*TINY, "--task", "video_retrieval", "--data", str(root), "--out", str(out), "--max-skipped", "0.5"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["clips"] == {"train": 14, "eval": 6} and results["metrics"].keys() >= {"mAP", "mAP_released", "R@1"} and results["teacher"]["kind"].startswith("embeddings")
    assert xmkd.load_checkpoint(out / "best.pt")["filter"]["adapter.weight"].shape == (32, 20) and xmkd.load_checkpoint(out / "best.pt")["classes"] == ["Zoo", "Ant"]
    reasons = dict(list(csv.reader((out / "skipped.csv").open()))[1:])
    assert "missing: no <clip id>.npy" in reasons["v_Zoo_g03_c01"] and "no HDF5 file with a JPEG a frame" in reasons[str(root / "v_Ant_g02_c01.hdf5")]


def test_teacher_features_replace_the_teacher_whatever_their_width(tmp_path, media, capsys):
    features = tmp_path / "features"
    for k, path in enumerate(sorted(media.rglob("*.mp4"))):
        file = features / path.relative_to(media).with_suffix(".npy")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, rand(7, seed=k).numpy().astype(np.float64))
    common = [*TINY, "--task", "action_recognition", "--data", str(media), "--cache", str(media.parent / "cache"), "--teacher-features", str(features), "--out", str(tmp_path / "run")]
    assert xmkd.main([*common, "--compare", "kd,ccl,xmkd", "--epochs", "1"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["teacher"]["kind"] == f"embeddings {features}" and list(results["table"]) == ["teacher", "kd", "ccl", "xmkd"]
    assert xmkd.main([*TINY, "--eval", str(tmp_path / "run" / "xmkd-s3" / "best.pt"), "--out", str(tmp_path / "eval")]) == 0      # silent about the teacher
    other = tmp_path / "other"
    (other / "train").mkdir(parents=True)
    assert xmkd.main([*common, "--method", "xmkd", "--out", str(tmp_path / "run" / "xmkd-s3"), "--resume", "--teacher-features", str(other)]) == 2
    for name, array, says in (("short", np.ones(3), "expected (7,), one embedding a clip"), ("nan", np.full(7, np.nan), "finite"), ("objects", np.array([{}] * 7), "pickled arrays are refused"),
                              ("table", np.ones((7, 1)), "(7, 1); expected (7,)"), ("complex", np.ones(7, complex), "expected real numbers"), ("text", np.array(["1"] * 7), "expected real numbers")):
        path = features / "train" / "low" / "3.npy"
        np.save(path, array)
        assert xmkd.main(common) == 2 and says in capsys.readouterr().err, name
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**12,)}
    for shape in ((10**12,), (-7,), (7, 10**12), (10**30,)):                     # promised by the header, not there
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
            file.write(bytes(28))
        assert xmkd.main(common) == 2 and f"{path}: no embedding" in capsys.readouterr().err, shape
    assert xmkd.main([*common, "--teacher", "scratch"]) == 2 and "exclude each other" in capsys.readouterr().err


def test_the_pretrained_teacher_sees_frames_as_it_was_trained_to(monkeypatch):
    build = xmkd.r2plus1d_18
    monkeypatch.setattr(xmkd, "r2plus1d_18", lambda weights, progress: build())                # no download: random weights
    teacher, frames = xmkd.KineticsTeacher().eval(), torch.randint(0, 256, (1, 4, 3, 32, 32), dtype=torch.uint8)
    ours = teacher(xmkd.Prepare()(frames))
    theirs = xmkd.R2Plus1D_18_Weights.KINETICS400_V1.transforms(crop_size=(32, 32), resize_size=(32, 32))(frames[0])
    assert [tuple(x.shape) for x in ours] == [(1, 1, 512), (1, 512), (1, 400)]
    assert torch.allclose(ours.pooled, teacher.net(theirs[None]), atol=1e-4)


def test_without_network_the_pretrained_teacher_gives_way_with_a_warning(tmp_path, media, monkeypatch):
    def offline(weights, progress):
        raise OSError("no network")
    monkeypatch.setattr(xmkd, "r2plus1d_18", offline)
    assert xmkd.main([*TINY, "--data", str(media), "--epochs", "1", "--out", str(tmp_path), "--cache", str(media.parent / "cache")]) == 0
    assert "cannot be had (no network)" in json.loads((tmp_path / "results.json").read_text())["warnings"][0]


def authors_checkpoint(path, num_classes, width, prefix="module."):
    """What the released training saves: both networks, the optimiser's state and schedulers pickled whole."""
    student, noise_filter = xmkd.make_network("video", num_classes, width), xmkd.ModalityNoiseFilter(num_classes, 8 * width)
    optimizers = [torch.optim.Adam(m.parameters(), 3e-4, weight_decay=5e-4) for m in (student, noise_filter)]
    schedulers = [torch.optim.lr_scheduler.MultiStepLR(optimizers[0], [150]), torch.optim.lr_scheduler.ReduceLROnPlateau(optimizers[1], "min")]
    student(rand(2, 3, 2, 32, 32)).logits.sum().backward()
    optimizers[0].step()                                                # so that its state holds tensors
    torch.save({"epoch": 7, "state_dict": {prefix + k: v for k, v in student.state_dict().items()},
                "audio_state_dict": {prefix + k: v for k, v in noise_filter.state_dict().items()}, "optimizer": optimizers[0].state_dict(),
                "scheduler": {"video_scheduler": schedulers[0], "audio_scheduler": schedulers[1]}}, path)
    return student


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_authors_checkpoints_load_and_evaluate(tmp_path, media, capsys, prefix):
    student = authors_checkpoint(tmp_path / "authors.pth", 2, 4, prefix)
    saved = xmkd.load_checkpoint(tmp_path / "authors.pth")
    assert saved["epoch"] == 7 and saved["network"] == {"kind": "video", "num_classes": 2, "width": 4, "blocks": [1, 1, 1, 1]}
    xmkd.VideoNet(2, width=4).load_state_dict(saved["student"])
    xmkd.ModalityNoiseFilter(2, 32).load_state_dict(saved["filter"])
    assert torch.equal(saved["student"]["cls.weight"], student.cls.weight)
    arguments = [*TINY, "--data", str(media), "--eval", str(tmp_path / "authors.pth"), "--cache", str(media.parent / "cache"), "--out", str(tmp_path / "run")]
    for task in ((), ("--task", "video_retrieval")):
        assert xmkd.main([*arguments, *task]) == 0, capsys.readouterr().err
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        assert results["task"] == (task[1] if task else "action_recognition") and results["method"] == "xmkd" and 0 <= results["metrics"]["top1"] <= 1
    authors_checkpoint(tmp_path / "authors.pth", 3, 4)
    assert xmkd.main(arguments) == 2 and re.search("knows 3 classes, .* has 2 ", capsys.readouterr().err)
    assert xmkd.main([*arguments, "--task", "audio_tagging"]) == 2 and "a checkpoint of --task action_recognition" in capsys.readouterr().err


@needs_testdata
@pytest.mark.parametrize("blocks", [(1, 1, 1, 1), (3, 4, 6, 3)])
def test_released_keys_and_shapes_are_ours(formula, blocks):
    network = xmkd.VideoNet(51, blocks)
    assert xmkd.network_of(network.state_dict()) == {"kind": "video", "num_classes": 51, "width": 64, "blocks": [*blocks]}
    keys = json.loads((TESTDATA / "parity" / "authors_keys.json").read_text())
    for part, module in (("state_dict", network), ("audio_state_dict", xmkd.ModalityNoiseFilter(51))):
        if blocks == (1, 1, 1, 1):
            assert [(k, shape) for k, shape, _ in keys[part]] == [(k, [*v.shape]) for k, v in module.state_dict().items()]


@needs_testdata
@pytest.mark.parametrize("name, stages, dim", [("cnn10", 4, 512), ("cnn14_emb512", 6, 512)])
def test_panns_checkpoints_load(tmp_path, name, stages, dim):
    keys = json.loads((TESTDATA / "parity" / "panns_keys.json").read_text())[name]["keys"]
    torch.save({"iteration": 600000, "model": {key: torch.zeros(shape) for key, shape, _ in keys}}, tmp_path / "panns.pth")
    saved = xmkd.load_checkpoint(tmp_path / "panns.pth")
    assert saved["network"] == {"kind": "audio", "num_classes": 527, "width": 64, "stages": stages, "dim": dim}
    xmkd.AudioNet(527, stages=stages, dim=dim).load_state_dict(saved["student"])


def test_a_panns_checkpoint_teaches_and_is_evaluated(tmp_path, media, capsys):
    assert xmkd.network_of(xmkd.AudioNet(527, stages=6, dim=2048).state_dict())["dim"] == 2048                   # Cnn14
    network = xmkd.AudioNet(2, width=4, stages=6, dim=20)
    torch.save({"model": {"spectrogram_extractor.stft.conv_real.weight": torch.zeros(3), "logmel_extractor.melW": torch.zeros(513, 64), **network.state_dict()}}, tmp_path / "panns.pth")
    common = [*TINY, "--data", str(media), "--cache", str(media.parent / "cache")]
    assert xmkd.main([*common, "--task", "action_recognition", "--teacher", str(tmp_path / "panns.pth"), "--out", str(tmp_path / "run")]) == 0
    assert xmkd.load_checkpoint(tmp_path / "run" / "best.pt")["filter"]["adapter.weight"].shape == (32, 20)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["teacher"]["kind"] == f"checkpoint {tmp_path / 'panns.pth'}"
    assert xmkd.main([*common, "--eval", str(tmp_path / "panns.pth"), "--out", str(tmp_path / "eval")]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "eval" / "results.json").read_text())["task"] == "audio_tagging"
    torch.save({"model": {"logmel_extractor.melW": torch.zeros(257, 64), **network.state_dict()}}, tmp_path / "16k.pth")
    state = network.state_dict()
    torch.save({"model": {key: state[key] for key in state if key != "conv_block2.bn1.weight"}}, tmp_path / "part.pth")
    for name, says in (("16k.pth", "another sample rate than 32 kHz"), ("part.pth", "conv_block2.bn1.weight")):
        with pytest.raises(xmkd.InputError, match=f"{name} is no checkpoint .*{says}"):
            xmkd.load_checkpoint(tmp_path / name)


def test_a_checkpoint_that_unpacks_to_more_than_itself_or_has_odd_settings_is_refused(tmp_path):
    network = {"kind": "audio", "num_classes": 2, "width": 2}
    content = {"student": xmkd.make_network(**network).state_dict(), "network": network, "classes": ["a", "b"], "task": "audio_tagging",
               "settings": {}, "filter": {}, "seed": 3, "method": "student", "epoch": 1, "versions": {}}
    torch.save(content, tmp_path / "a.pt")
    assert xmkd.load_checkpoint(tmp_path / "a.pt")["classes"] == ["a", "b"]
    with zipfile.ZipFile(tmp_path / "a.pt") as whole, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for part in whole.infolist():
            packed.writestr(part.filename, b"\0" * 10 ** 7 if part.filename.endswith("data/0") else whole.read(part))
    with pytest.raises(xmkd.InputError, match=r"b.pt is no readable checkpoint: its parts are compressed and would take 10 MB"):
        xmkd.load_checkpoint(tmp_path / "b.pt")
    for key, value in (("settings", 5), ("classes", "ab"), ("filter", None), ("seed", "3")):
        torch.save({**content, key: value}, tmp_path / "c.pt")
        with pytest.raises(xmkd.InputError, match=f"{key} holds"):
            xmkd.load_checkpoint(tmp_path / "c.pt")


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)
    torch.save({"student": Evil(), "network": {}, "classes": []}, tmp_path / "evil.pt")
    with pytest.raises(xmkd.InputError, match="no readable checkpoint"):
        xmkd.load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("key, value, says", [
    ("cls.weight", torch.zeros(3, 5), "cls.weight"), ("cls.weight", torch.zeros(3, 32, dtype=torch.int64), "cls.weight holds torch.int64"),
    ("cls.weight", torch.zeros(3, 32, dtype=torch.complex64), "cls.weight holds torch.complex64"), ("cls.weight", [1.0], "cls.weight holds <class 'list'>"),
    ("bn1.weight", torch.full((4,), math.nan), "bn1.weight holds numbers that are infinite"), ("bn1.running_var", torch.full((4,), math.inf), "bn1.running_var"),
    ("cls.bias", torch.zeros(3).to_sparse(), "cls.bias"),
    ("cls.weight", torch.zeros(1).expand(10**12, 32), "cls.weight of shape .* more numbers than the file"), ("cls.weight", torch.empty(10**12, 32, device="meta"), "cls.weight of shape")])
@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("authors", [False, True])
def test_weights_that_cannot_be_are_refused_by_name(tmp_path, key, value, says, authors):
    state = {**xmkd.make_network("video", 3, 4).state_dict(), key: value}
    classes = len(value) if says.startswith("cls.weight of") else 3
    if classes > 3:                                                      # a checkpoint that agrees with itself
        state["cls.bias"] = torch.zeros(1).expand(classes)
    ours = {"student": state, "network": {"kind": "video", "num_classes": classes, "width": 4}, "classes": list("abc"), "task": None}
    torch.save({"state_dict": state} if authors else ours, tmp_path / "bad.pt")
    with pytest.raises(xmkd.InputError, match=f"bad.pt is no checkpoint .*{says}"):
        xmkd.load_checkpoint(tmp_path / "bad.pt")


@pytest.mark.parametrize("change", [{"num_classes": 10**12}, {"width": 10**9}, {"width": 10**30}, {"width": 0}, {"width": -4}, {"blocks": [10**12, 1, 1, 1]}, {"stages": 10**9}, {"kind": "x"}])
def test_networks_that_the_weights_do_not_fill_are_refused_before_they_are_built(tmp_path, change):
    network = {"kind": "video", "num_classes": 3, "width": 4, **change}
    torch.save({"student": xmkd.make_network("video", 3, 4).state_dict(), "network": network, "classes": list("abc"), "task": None}, tmp_path / "bad.pt")
    begun = time.time()
    with pytest.raises(xmkd.InputError, match="bad.pt is no checkpoint .*`network` asks for"):
        xmkd.load_checkpoint(tmp_path / "bad.pt")
    assert time.time() - begun < 5


def test_evaluation_leaves_weights_and_mode_alone(tmp_path):
    data, network = demo_data(tmp_path), xmkd.make_network("video", 10, 4).train()
    job = xmkd.Job({"batch_size": 2, "workers": 0}, data, xmkd.ViewSpec("video", 4, 16), xmkd.Console(quiet=True))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    scores, pooled = xmkd.predict(job, network, data.eval)
    assert network.training and all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert scores.shape == (2, 10) and pooled.shape == (2, 32) and torch.allclose(scores.sum(1), torch.ones(2))


# ------------------------------------------------------------------------------------------------ promises
TREE = ast.parse((HERE / "xmkd.py").read_text())
DEFINITIONS = {node.name: node for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


BANNERS = [i for i, line in enumerate((HERE / "xmkd.py").read_text().splitlines(), 1) if line.startswith("# ====")]
PROMISED = [name for name, node in DEFINITIONS.items() if sum(b < node.lineno for b in BANNERS) in (1, 2, 3, 4, 5, 8)]      # README, "Take one function"


def media_clip(tmp_path):
    encode(tmp_path / "clip.mp4", seconds=1.0)
    return str(tmp_path / "clip.mp4")


def stepped(m, tmp_path):
    student, noise_filter = m["VideoNet"](3, width=4), m["ModalityNoiseFilter"](3, 32)
    return m["train_step"](student, noise_filter, m["make_optimizer"](student, noise_filter), rand(4, 3, 8, 32, 32), rand(4, 32), CLASSES)


CLASSES, TAGS = torch.tensor([0, 1, 1, 2]), torch.tensor([[1, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0]])
CALLS = {                                                          # by name: a call in a namespace of pasted definitions
    "cosine_matrix": lambda m, _: m["cosine_matrix"](rand(4, 8), rand(5, 8)), "label_overlap": lambda m, _: m["label_overlap"](TAGS),
    "classification_loss": lambda m, _: m["classification_loss"](rand(4, 3), TAGS),
    "csc_loss": lambda m, _: m["csc_loss"](rand(4, 8), rand(4, 8, seed=1), rand(4, 4), CLASSES),
    "sparsity_loss": lambda m, _: m["sparsity_loss"](rand(4, 8)), "triplet_loss": lambda m, _: m["triplet_loss"](rand(4, 8), rand(4, 8), rand(4, 8)),
    "ModalityNoiseFilter": lambda m, _: m["ModalityNoiseFilter"](3, 8)(rand(4, 8), rand(4, 5, 8)), "gather": lambda m, _: m["gather"](rand(3)),
    "train_step": stepped, "make_optimizer": stepped, "log_probabilities": lambda m, _: m["log_probabilities"](rand(4, 3), TAGS),
    "kd_loss": lambda m, _: m["kd_loss"](rand(4, 3), rand(4, 3, seed=1), CLASSES), "fitnet_loss": lambda m, _: m["fitnet_loss"](rand(4, 8), rand(4, 8, seed=1)),
    "crd_loss": lambda m, _: m["crd_loss"](rand(4, 8), rand(4, 8, seed=1), CLASSES),
    "ccl_loss": lambda m, _: m["ccl_loss"](m["Features"](rand(4, 5, 8), rand(4, 8), rand(4, 3)), rand(4, 8), CLASSES, torch.nn.Linear(16, 8), torch.nn.Linear(8, 3)),
    "Distiller": lambda m, _: m["Distiller"]("csc", 3, 8, 6)(m["Features"](rand(4, 5, 8), rand(4, 8), rand(4, 3)), rand(4, 6), CLASSES),
    "linear_probe": lambda m, _: m["linear_probe"](rand(4, 8), CLASSES, 3).weight,
    "FactorisedConv3d": lambda m, _: m["FactorisedConv3d"](3, 4, (3, 3, 3))(rand(1, 3, 4, 8, 8)), "VideoBlock": lambda m, _: m["VideoBlock"](3, 4, True)(rand(1, 3, 4, 8, 8)),
    "VideoNet": lambda m, _: m["VideoNet"](3, width=4)(rand(1, 3, 8, 32, 32)), "LogMel": lambda m, _: m["LogMel"]()(rand(2, 32000)),
    "AudioBlock": lambda m, _: m["AudioBlock"](1, 4, 2)(rand(1, 1, 8, 8)), "AudioNet": lambda m, _: m["AudioNet"](3, width=4, dim=32)(rand(1, 40, 64)),
    "make_network": lambda m, _: m["make_network"]("audio", 3, 4)(rand(1, 40, 64)),
    "Prepare": lambda m, _: m["Prepare"](16)((rand(1, 2, 3, 20, 20) * 255).byte(), torch.tensor([[2.0, 2.0, 18.0, 18.0]])),
    "decode_audio": lambda m, path: m["decode_audio"](media_clip(path)), "decode_video": lambda m, path: m["decode_video"](media_clip(path)),
    "load_streams": lambda m, path: [*m["load_streams"](m["Clip"]("a", (0,), "eval", None, media_clip(path)), ["video"])],
    "walk_media": lambda m, path: len(m["walk_media"](os.path.dirname(media_clip(path)))), "is_sound_only": lambda m, _: m["is_sound_only"]("a.wav"),
    "mean_average_precision": lambda m, _: m["mean_average_precision"](rand(4, 3), TAGS), "mean_auc": lambda m, _: m["mean_auc"](rand(4, 3), TAGS),
    "topk_accuracy": lambda m, _: m["topk_accuracy"](rand(4, 3), CLASSES), "score": lambda m, _: m["score"]("audio_tagging", rand(4, 3), TAGS),
    "retrieval_metrics": lambda m, _: m["retrieval_metrics"](rand(4, 8), rand(4, 8, seed=1), CLASSES, CLASSES),
    "even_windows": lambda m, _: m["even_windows"](40), "sliding_windows": lambda m, _: m["sliding_windows"](40),
    "heat": lambda m, _: m["heat"](rand(4, 4)), "draw_attention": lambda m, _: m["draw_attention"](rand(3, 8, 32, 32), rand(4))}


@pytest.mark.parametrize("name", [*PROMISED, "load_checkpoint", "even_windows", "sliding_windows", "heat", "draw_attention"])
def test_public_functions_need_only_the_imports_and_what_they_call(name, tmp_path):
    needed, queue = [], [name] + (["VideoNet", "ModalityNoiseFilter", "make_optimizer", "train_step"] if name in ("train_step", "make_optimizer") else [])
    queue += ["Features"] * (name in ("ccl_loss", "Distiller")) + ["Clip"] * (name == "load_streams")                         # for the call alone
    while queue:
        if (current := queue.pop()) not in needed:
            needed.append(current)
            queue += [n.id for n in ast.walk(DEFINITIONS[current]) if isinstance(n, ast.Name) and n.id in DEFINITIONS]
    imports = [n for n in TREE.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    pasted = {}
    exec(compile(ast.Module([*imports, *(DEFINITIONS[n] for n in DEFINITIONS if n in needed)], []), "pasted", "exec"), pasted)
    used = {n.id for d in needed for n in ast.walk(DEFINITIONS[d]) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    globals_of_module = {t.id for n in TREE.body if isinstance(n, (ast.Assign, ast.AnnAssign)) for t in getattr(n, "targets", [getattr(n, "target", None)]) if isinstance(t, ast.Name)}
    assert callable(pasted[name]) and not used & globals_of_module
    if name in CALLS:
        results = []
        for namespace in (pasted, vars(xmkd)):
            torch.manual_seed(0)
            results.append(repr(CALLS[name](namespace, tmp_path)))
        assert results[0] == results[1] != "None"


def test_every_option_is_used_and_explained(capsys):
    with pytest.raises(SystemExit) as stop:
        xmkd.main(["--help"])
    printed, source = capsys.readouterr().out, (HERE / "xmkd.py").read_text()
    assert stop.value.code == 0
    for action in xmkd.build_parser()._actions:
        assert action.help and all(o in printed for o in action.option_strings)
        assert action.dest in ("help", "version") or len(re.findall(rf"""["']{action.dest}["']""", source)) >= 2 - ("-" in action.option_strings[0][2:]), action.dest


def test_evaluation_does_not_complain_about_training_clips(tmp_path):
    for name in ("train/a/1.wav", "val/a/2.mp4"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    settings = {"data": str(tmp_path), "task": "action_recognition", "split": "balanced", "fold": 1}
    skipped, console = [], xmkd.Console(quiet=True)
    clips, _, _ = xmkd.list_clips("folder", {**settings, "eval": "best.pt"}, skipped, console)
    assert [c.id for c in clips] == ["val/a/2"] and skipped == []
    with pytest.raises(xmkd.InputError, match="train split .* is empty: .*; train/a/1: missing: no file with the other stream"):
        xmkd.list_clips("folder", settings, skipped, console)


@pytest.mark.parametrize("picture", [False, True])
def test_sound_alone_trains_a_student_and_no_clip_is_added_where_others_have_both(tmp_path, picture):
    for name in ("train/a/1.wav", "train/a/2.wav", "val/a/3.wav", *["train/a/4.mp4"] * picture):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    settings, console = {"data": str(tmp_path), "task": "audio_tagging", "split": "balanced", "fold": 1}, xmkd.Console(quiet=True)
    for more in ({"method": "student"}, {"compare": "student"}, {"eval": "best.pt"}):
        clips, _, needs = xmkd.list_clips("folder", {**settings, **more}, [], console)
        both = picture and "eval" not in more
        assert {c.id for c in clips if c.split == "train"} == ({"train/a/4"} if both else set() if "eval" in more else {"train/a/1", "train/a/2"})
        assert needs["eval"] == ["audio"] and ("eval" in more or needs["train"] == (["audio", "video"] if both else ["audio"]))
    if not picture:
        with pytest.raises(xmkd.InputError, match="no file with the other stream"):
            xmkd.list_clips("folder", {**settings, "compare": "student,xmkd"}, [], console)


def test_recipes_follow_the_data_set(tmp_path):
    (tmp_path / "activity_net.v1-3.min.json").write_text('{"database": {"a": {"annotations": [{"segment": [0, 1]}]}}}')
    _, methods, settings = xmkd.settle({"data": str(tmp_path), "task": "action_recognition", "lr": 0.1}, {})
    assert (settings["batch_size"], settings["csc_offset"], settings["epochs"], settings["lr"], methods) == (64, 0.2, 200, 0.1, ["xmkd"])
    (tmp_path / "ucfTrainTestlist").mkdir()
    settings = xmkd.settle({"data": str(tmp_path)}, {})[2]
    assert (settings["batch_size"], settings["csc_offset"], settings["epochs"], settings["lr"], settings["width"]) == (32, 0.07, 200, 3e-4, 64)
    assert xmkd.settle({"compare": "paper"}, {})[1] == list(xmkd.METHODS)


def readme_commands():
    """README's commands that run the program, in order: those of its ```bash blocks and of its tables."""
    text, found = (HERE / "README.md").read_text().replace("\\\n", " "), []
    for block, row in re.findall(r"```bash\n(.*?)```|^(\|[^\n]*)$", text, re.S | re.M):
        found += [part for line in block.splitlines() for part in line.split("#")[0].split("&&")] + re.findall("`([^`]*)`", row)
    return [command.strip() for command in found if re.search(r" xmkd\.py( |$)", command)]


def test_readme_commands_parse():
    commands = readme_commands()
    assert len(commands) >= 20
    for command in commands:
        xmkd.build_parser().parse_args(shlex.split(command.split(" xmkd.py", 1)[1]))


def what_readme_names(root):
    """In small: two classes in each layout, eight training and four evaluation clips of a second, checkpoints, files to predict."""
    def put(name, content):                                                                # a list's rows one by one
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with (root / name).open("ab") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
    put("audioset/class_labels_indices.csv", "index,mid,display_name\n0,/m/0,Archery\n1,/m/1,Typing\n")
    put("ucf101/ucfTrainTestlist/classInd.txt", "3 Archery\n95 Typing\n")
    entries = {}
    for k in range(12):
        part, label, ytid = "train" if k < 8 else "test", ("Archery", "Typing")[k % 2], f"{k:011}"
        clip = Path(encode(root / "holiday.mp4", seconds=1.0, tone=400.0 + 200 * k)).read_bytes()
        for name in (f"audioset/Y{ytid}.mp4", f"ucf101/UCF-101/{label}/v_{label}_g{k:02}_c01.avi", f"activitynet/v_{ytid}.mp4", f"vggsound/{ytid}_000000.mp4", f"clips/{k}.mp4"):
            put(name, clip)
        put(f"audioset/{('balanced_train', 'unbalanced_train', 'eval')[k // 4]}_segments.csv", f'{ytid}, 0.000, 10.000, "/m/{k % 2}"\n')
        put(f"ucf101/ucfTrainTestlist/{part}list01.txt", f"{label}/v_{label}_g{k:02}_c01.avi\n")
        put("vggsound/vggsound.csv", f"{ytid},0,{label},{part}\n")
        entries[ytid] = {"subset": "training" if k < 8 else "validation", "annotations": [{"label": label, "segment": [0, 1]}]}
    put("activitynet/activity_net.v1-3.min.json", json.dumps({"database": entries}))
    (root / "avdigits").mkdir()
    for name in ("audioset", "ucf101"):
        os.symlink(f"../{name}", root / "avdigits" / name)
    for name, stages in (("Cnn14_emb512_mAP=0.420.pth", 6), ("Cnn10_mAP=0.380.pth", 4)):
        torch.save({"model": {"logmel_extractor.melW": torch.zeros(513, 64), **xmkd.AudioNet(2, width=2, stages=stages).state_dict()}}, root / name)
    authors_checkpoint(root / "save_model.pth", 2, 2)
    if importlib.util.find_spec("h5py"):
        release(root / "release")


@stress
def test_readme_commands_run_in_order_on_tiny_data(tmp_path, monkeypatch, capsys):
    def offline(weights, progress):
        raise OSError("no network")
    few, compiled, failed = xmkd.demo_clips, torch.nn.Module.compile, []
    monkeypatch.setattr(xmkd, "r2plus1d_18", offline)
    monkeypatch.setattr(xmkd, "demo_clips", lambda tags, *sizes: few(tags, 20, 10))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled(self, backend="eager"))       # traced only: building C++ takes minutes
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")                                 # torchrun's processes are offline, too
    monkeypatch.chdir(tmp_path)
    what_readme_names(tmp_path)
    for command in readme_commands():
        before, after = f"{command} ".split(" xmkd.py ", 1)
        if "./release" in after and not Path("release").exists():
            continue
        try:
            given = vars(xmkd.build_parser().parse_args(words := shlex.split(after)))
            named = [*given.get("predict", []), *(given[key] for key in ("data", "eval", "checkpoint", "gallery", "teacher", "teacher_features") if key in given)]
            missing, runs = [name for name in named if name not in ("demo", "auto", "scratch") and not Path(name).exists()], {*Path("runs").glob("*")}
            words += ["--workers", "0", "--quiet"]
            if not given.keys() & {"eval", "predict", "explain"}:                           # whose checkpoints bring their sizes
                words += [*"--width 2 --size 32 --frames 2 --teacher-epochs 1 --epochs".split(), "2" if "resume" in given else "1"]
            if "seeds" in given:
                words += ["--seeds", "1" if "compare" in given else "2"]                    # a method's only seed has no folder of its own
            if missing:
                code, said = 2, f"nothing has made {', '.join(missing)}"
            elif "torchrun" in before.split():
                result = torchrun(HERE / "xmkd.py", *words, "--device", "cpu")
                code, said = result.returncode, result.stderr
            else:
                code, said = xmkd.main(words), capsys.readouterr().err
            if not code and "resume" in given and {*Path("runs").glob("*")} != runs:
                code, said = 2, "nothing has made a run to resume"
            failed += [f"{command}\n    {said.strip()}"] * bool(code)
        except Exception as error:
            error.add_note(f"README: {command}")
            raise
    assert not failed, "commands of README that fail:\n" + "\n".join(failed)


def test_readme_examples_run_and_print_what_they_say(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"print\(.*  # (.*)$", example, re.M) and example.count("print(") == 4


def test_the_module_runs_as_a_program():
    result = subprocess.run([sys.executable, str(HERE / "xmkd.py"), "--data", "/nowhere"], capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr and inspect.getdoc(xmkd)
