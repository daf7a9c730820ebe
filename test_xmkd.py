"""Tests of xmkd.py, in the order of its sections.

XMKD_TESTDATA names a folder with the authors' numbers, real lists and media with right values;
tests that need it are skipped where it is not set.
"""
import ast
import csv
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xmkd

torch.set_num_threads(1)
TESTDATA = Path(os.environ.get("XMKD_TESTDATA", "/nowhere"))
PARITY = TESTDATA / "parity"
needs_testdata = pytest.mark.skipif(not TESTDATA.is_dir(), reason="XMKD_TESTDATA names no folder")

def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))

def close(ours, right, atol=1e-5):
    """Fails unless numbers, lists or tensors agree, to `atol`."""
    ours = torch.as_tensor(ours, dtype=torch.float64).detach()
    right = torch.as_tensor(right, dtype=torch.float64).detach()
    assert ours.shape == right.shape
    assert (ours - right).abs().max() <= atol

# A batch of four clips: embeddings p, evidence s^, teacher t, similarities and labels.
P = rand(4, 6) - 0.3
EVIDENCE = rand(4, 6, seed=1) - 0.3
TEACHER = rand(4, 6, seed=2)
SIMILARITY = rand(4, 4, seed=3) * 2 - 1
CLASSES = torch.tensor([0, 1, 1, 2])
TAGS = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0]])

# -------------------- 1. Method and 2. Compared methods --------------------
def test_csc_of_two_clips_worked_by_hand():
    # cosines of p = (1, 0), (0, 1) with s^ = (1, 0), (.6, .8): [[1, .6], [0, .8]]
    # temperatures, where -1 counts as 0: [[.43, 0], [-1, .93]] + .07 = [[.5, .07], [.07, 1]]
    # logits: [[2, 8.571429], [0, .8]]; each clip is its only positive
    evidence = torch.tensor([[2.0, 0.0], [3.0, 4.0]])
    similarity = torch.tensor([[0.43, 0.0], [-1.0, 0.93]])
    loss = xmkd.csc_loss(torch.eye(2), evidence, similarity, torch.arange(2), offset=0.07)
    first = math.log(1 + math.exp(8.571429 - 2))
    second = math.log(1 + math.exp(0 - 0.8))
    close(loss, (first + second) / 2)
    # a hopeless positive costs no more than -log(1e-10)
    wrong = torch.eye(2).flip(0)
    hopeless = xmkd.csc_loss(torch.eye(2), wrong, torch.zeros(2, 2), torch.arange(2), 0.01)
    close(hopeless, 10 * math.log(10), 1e-3)

@pytest.mark.parametrize("labels", [CLASSES, TAGS], ids=["classes", "tags"])
def test_csc_agrees_with_a_double_loop(labels):
    cosines = F.cosine_similarity(P[:, None], EVIDENCE, dim=2).tolist()
    overlap = xmkd.label_overlap(labels).tolist()
    total = 0.0
    for i in range(4):
        z = []
        for j in range(4):
            temperature = max(SIMILARITY[i, j].item(), 0) + 0.2
            z.append(math.exp(cosines[i][j] / temperature))
        for j in range(4):
            weight = overlap[i][j] / sum(overlap[i])
            total -= weight * math.log(z[j] / sum(z) + 1e-10)
    close(xmkd.csc_loss(P, EVIDENCE, SIMILARITY, labels, 0.2), total / 4)

def test_csc_refuses_what_spoils_its_temperature():
    with pytest.raises(ValueError, match="detached"):
        xmkd.csc_loss(P, EVIDENCE, rand(4, 4).requires_grad_(), CLASSES)
    with pytest.raises(ValueError, match="offset is 0"):
        xmkd.csc_loss(P, EVIDENCE, SIMILARITY, CLASSES, offset=0)

def test_labels_overlap_by_equality_or_by_the_jaccard_index():
    same = [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    close(xmkd.label_overlap(CLASSES), same)
    # tags {0, 2}, {1}, {1, 2}, {0}: {1} and {1, 2} share one of two, {0, 2} and {1, 2} one of three
    close(xmkd.label_overlap(TAGS)[2], [1 / 3, 1 / 2, 1, 0])
    close(xmkd.label_overlap(torch.zeros(2, 3)), [[1, 1], [1, 1]])

def test_losses_of_the_filter_and_of_tags_worked_by_hand():
    close(xmkd.sparsity_loss(torch.tensor([[1.0, -2.0], [-4.0, 0.0]])), (3 + 4) / 2)
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    raw = torch.tensor([[5.0, 0.0], [0.0, 1.0]])                        # cosines 1 and 0
    purified = torch.tensor([[3.0, 4.0], [2.0, 0.0]])                   # cosines .6 and 1
    close(xmkd.triplet_loss(student, raw, purified, 0.2), (1 - 0.6 + 0.2 + 0) / 2)
    close(xmkd.classification_loss(torch.zeros(4, 3), TAGS), 3 * math.log(2))

def setting(method="xmkd", kind="video", labels=CLASSES, teacher_dim=32):
    """Returns a student of D = 32, what the method trains beside it, and a batch; in float64."""
    torch.manual_seed(0)
    student = xmkd.make_network(kind, 3, 4).double()
    teacher = rand(4, teacher_dim).double()
    helper = None
    if method in ("mnf", "xmkd"):
        helper = xmkd.ModalityNoiseFilter(3, 32, teacher_dim=teacher_dim).double()
    elif method != "student":
        probe = xmkd.linear_probe(teacher, labels, 3)
        helper = xmkd.Distiller(method, 3, 32, teacher_dim, probe=probe).double()
    shape = (3, 4, 16, 16) if kind == "video" else (48, 64)
    return student, helper, [rand(4, *shape).double(), teacher, labels]

@pytest.mark.parametrize("calibrate", [True, False])
def test_the_filter_loss_trains_the_filter_and_the_student_loss_trains_both(calibrate):
    student, helper, (inputs, teacher, labels) = setting()
    still = torch.optim.SGD(student.parameters(), lr=0.0)
    xmkd.train_step(student, helper, still, inputs, teacher, labels, calibrate=calibrate)
    p = student(inputs)
    found = helper(teacher, p.map)
    similarity = xmkd.cosine_matrix(p.pooled, found.teacher).detach() * calibrate
    csc = xmkd.csc_loss(p.pooled, found.evidence, similarity, labels)
    student_loss = F.cross_entropy(p.logits, labels) + csc
    filter_loss = F.cross_entropy(found.logits, labels)
    filter_loss += 1e-3 * xmkd.sparsity_loss(helper.gated_feature_composer[3].weight)
    filter_loss += xmkd.triplet_loss(p.pooled, teacher, found.teacher)
    for network, loss in (student, student_loss), (helper, student_loss + filter_loss):
        weights = list(network.parameters())
        expected = torch.autograd.grad(loss, weights, retain_graph=True)
        for weight, gradient in zip(weights, expected):
            close(weight.grad, gradient, 1e-9)

@pytest.mark.parametrize("kind, labels, dim", [("video", CLASSES, 32), ("audio", TAGS, 20)])
@pytest.mark.parametrize("method", ["student", *xmkd.Distiller.methods, "mnf", "xmkd"])
def test_each_method_lowers_its_loss_and_trains_its_layers(kind, labels, dim, method):
    student, helper, batch = setting(method, kind, labels, dim)
    optimizer = xmkd.make_optimizer(student, helper, lr=1e-3, filter_lr=1.0)
    before = [weight.clone() for weight in student.parameters()]
    totals = []
    for _ in range(8):
        terms = xmkd.train_step(student, helper, optimizer, *batch, calibrate=method != "mnf")
        totals.append(sum(terms.values()))
    assert totals[-1] < totals[0]
    for weight, old in zip(student.parameters(), before):
        assert not torch.equal(weight, old)
    if helper is not None:
        for weight in helper.parameters():
            assert (weight.grad is None) == (method == "kd")            # its probe stays as it is

def test_the_filter_learns_at_a_fifth_of_the_students_rate():
    groups = xmkd.make_optimizer(nn.Linear(2, 2), nn.Linear(2, 2)).param_groups
    close([group["lr"] for group in groups], [3e-4, 6e-5], 1e-9)
    assert [group["weight_decay"] for group in groups] == [5e-4, 5e-4]

# -------------------- 3. Networks --------------------
def shapes(features):
    return [tuple(part.shape) for part in features]

def test_networks_return_map_embedding_and_logits():
    video = xmkd.VideoNet(7, width=8)(rand(2, 3, 16, 32, 48))
    assert shapes(video) == [(2, 2 * 2 * 3, 64), (2, 64), (2, 7)]
    close(video.pooled, video.map.mean(1))
    sound = rand(2, 101, 64)
    assert shapes(xmkd.AudioNet(7, 8, dim=20)(sound)) == [(2, 6 * 4, 64), (2, 20), (2, 7)]
    assert shapes(xmkd.AudioNet(7, 4, stages=6)(sound)) == [(2, 3 * 2, 128), (2, 512), (2, 7)]
    assert shapes(xmkd.make_network("audio", 7, 8)(sound))[1] == (2, 64)
    plain = xmkd.AudioNet(7, 8, dim=None)(sound)                        # without fc1
    profile = plain.map.unflatten(1, (6, 4)).mean(2)           # (2, 6, 64): mean over mel
    close(plain.pooled, profile.amax(1) + profile.mean(1))

def test_views_are_normalised_and_only_training_sound_is_masked():
    prepare = xmkd.Prepare().eval()
    white = prepare(torch.full((1, 2, 3, 4, 5), 255, dtype=torch.uint8))
    assert white.shape == (1, 3, 2, 4, 5)
    close(white[0, :, 0, 0, 0], [2.2489, 2.4286, 2.64], 1e-3)           # (1 - mean) / std
    sound = (rand(2, 32000) * 2000).to(torch.int16)
    clean = prepare(sound)
    close(clean, xmkd.LogMel()(sound / 32767))
    torch.manual_seed(0)
    masked = prepare.train()(sound)
    changed = (masked - clean).abs() > 1e-3                             # (2, 101, 64)
    assert (masked[changed] - clean.mean()).abs().max() < 1e-3
    assert 0 < changed.all(1).sum(1).max() <= 2 * 8                     # mel bands of 64
    assert 0 < changed.all(2).sum(1).max() <= 2 * 6                     # frames of 101

# -------------------- Parity with the authors' and PANNs' code --------------------
@pytest.fixture(scope="module")
def formula():
    """Imports the module that makes weights and inputs from their names."""
    path = PARITY / "formula_weights.py"
    spec = importlib.util.spec_from_file_location("formula_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def numbers(name):
    return np.load(PARITY / "open" / f"{name}.npz")

def fill(network, formula, salt, **more):
    keys = [(key, value.shape) for key, value in network.state_dict().items()]
    weights = formula.fill(keys, f"open/{salt}", **more)
    network.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    return network.eval()

@needs_testdata
def test_the_video_student_agrees_with_the_authors(formula):
    right = numbers("video")
    net = fill(xmkd.VideoNet(51), formula, "video")
    keys = json.loads((PARITY / "authors_keys.json").read_text())["state_dict"]
    assert list(net.state_dict()) == [key for key, *_ in keys]
    clips = torch.from_numpy(formula.normal("video_eval", (2, 3, 16, 112, 112), "open"))
    with torch.no_grad():
        out = net(clips)
    close(out.map[:, right["eval_map_row_ids"]], right["eval_map_rows"], 5e-5)
    close(out.pooled, right["eval_feature"])
    close(out.logits, right["eval_logits"])

@needs_testdata
def test_two_training_steps_agree_with_the_authors_in_float64(formula):
    right = numbers("trajectory")
    student = fill(xmkd.VideoNet(51), formula, "video").double()
    noise_filter = fill(xmkd.ModalityNoiseFilter(51), formula, "mnf").double()
    optimizer = xmkd.make_optimizer(student, noise_filter)
    for i in range(2):
        clips = formula.normal(f"traj_clip_{i}", (6, 3, 8, 56, 56), "open")
        teacher = formula.relu_features(f"traj_teacher_{i}", (6, 512), "open")
        batch = [torch.from_numpy(array).double() for array in (clips, teacher)]
        labels = torch.from_numpy(right[f"labels_{i}"])
        terms = xmkd.train_step(student, noise_filter, optimizer, *batch, labels)
        ours = [terms[name] for name in ("cls", "filter_cls", "csc", "sparsity", "triplet")]
        close(ours, right["full__f64__losses"][i], 1e-9)

@needs_testdata
@pytest.mark.parametrize("name, stages", [("cnn10", 4), ("cnn14_emb512", 6)])
def test_the_audio_networks_agree_with_panns(formula, name, stages):
    right = numbers("panns")
    sound = torch.from_numpy(formula.waveform("panns_wave", 2, 64000, 32000, "open"))
    close(xmkd.LogMel()(sound), right["logmel"], 1e-3)
    net = fill(xmkd.AudioNet(527, stages=stages), formula, name, front_bn="bn0")
    keys = json.loads((PARITY / "panns_keys.json").read_text())[name]["keys"]
    assert list(net.state_dict()) == [key for key, *_ in keys if "extractor" not in key]
    with torch.no_grad():
        out = net(torch.from_numpy(right["logmel"]))
    close(out.pooled, right[f"{name}_embedding"], 2e-5)
    close(out.logits.sigmoid(), right[f"{name}_clipwise_output"], 5e-6)

@needs_testdata
@pytest.mark.parametrize("kind", ["", "weak_"])
def test_retrieval_agrees_with_the_authors(kind):
    right = numbers("retrieval")
    names = ("val_features", "train_features", "val_labels", "train_labels")
    data = [right[kind + name] for name in names]
    for k, expected in zip(right[kind + "hit_k"], right[kind + "hit_rate"]):
        close(xmkd.retrieval_metrics(*data, ks=[k])[f"R@{k}"], expected, 1e-9)
    for k, expected in zip(right[kind + "map_k"], right[kind + "map"]):
        close(xmkd.retrieval_metrics(*data, topk=k)["mAP_released"], expected, 1e-9)

# -------------------- 8. Metrics --------------------
def test_map_and_auc_agree_with_loops_that_count_ties():
    scores = (rand(40, 5) * 8).round()
    labels = (rand(40, 5, seed=1) > 0.7).long()
    labels[:, 4] = 0                                                    # no positive: left out
    precisions, areas = [], []
    for c in range(4):
        hits = scores[labels[:, c] == 1, c].tolist()
        misses = scores[labels[:, c] == 0, c].tolist()
        for limit in hits:                                              # down to each hit's score
            true = sum(hit >= limit for hit in hits)
            false = sum(miss >= limit for miss in misses)
            wins = sum(limit > miss for miss in misses) + misses.count(limit) / 2
            precisions.append(true / (true + false) / len(hits))
            areas.append(wins / len(misses) / len(hits))
    close(xmkd.mean_average_precision(scores, labels), sum(precisions) / 4, 1e-6)
    close(xmkd.mean_auc(scores, labels), sum(areas) / 4, 1e-6)

def test_scores_of_classes_and_tags_worked_by_hand():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]])
    assert xmkd.score(scores, torch.tensor([2, 0])) == {"top1": 0.5, "top5": 1.0}
    # tag 0: the hit comes first, AP 1, AUC 1; tag 1: hits at 2 and 3 of 4, AP (1/2 + 2/3) / 2, AUC
    # 1/2; the normal distribution reaches the mean AUC of 0.75 at 0.6745, and d' is sqrt(2) of it
    columns = torch.tensor([[0.4, 0.9], [0.3, 0.5], [0.2, 0.2], [0.1, 0.1]])
    tags = xmkd.score(columns, torch.tensor([[1, 0], [0, 1], [0, 1], [0, 0]]))
    assert list(tags) == ["mAP", "AUC", "d_prime"]
    close(list(tags.values()), [19 / 24, 0.75, 0.9539], 1e-4)
    perfect = xmkd.score(columns, torch.tensor([[1, 1], [0, 0], [0, 0], [0, 0]]))
    assert 8 < perfect["d_prime"] < 9                                   # instead of infinite
    assert set(xmkd.score(scores, torch.ones(2, 3))) == {"mAP"}         # no negatives, no AUC
    with pytest.raises(ValueError, match="none of 3 classes has a positive in 2 clips"):
        xmkd.score(scores, torch.zeros(2, 3))

def test_retrieval_worked_by_hand():
    # the first query ranks a, c, b: hits at 1 and 3, precisions 1 and 2/3; the second has no hit
    gallery = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    queries = torch.tensor([[3.0, 1.0], [1.0, 0.0]])
    data = queries, gallery, [0, 5], [0, 0, 1]
    found = xmkd.retrieval_metrics(*data, ks=(1, 50), topk=2)
    assert list(found) == ["R@1", "R@50", "mAP", "mAP_released"]
    close(list(found.values()), [1 / 2, 1 / 2, 5 / 12, 1])
    # equal similarities: the miss comes first, hits at 2 and 3, precisions 1/2 and 2/3
    data = torch.ones(1, 2), torch.ones(3, 2), [1], [1, 0, 1]
    found = xmkd.retrieval_metrics(*data, ks=(1, 2))
    close(list(found.values()), [0, 1, 7 / 12, 7 / 12])

# -------------------- Take one function --------------------
SOURCE = Path(xmkd.__file__).read_text()
TREE = ast.parse(SOURCE)
IMPORTS = [node for node in TREE.body if isinstance(node, (ast.Import, ast.ImportFrom))]
DEFINITIONS = {n.name: n for n in TREE.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
BANNERS = [i for i, line in enumerate(SOURCE.splitlines()) if line.startswith("# -----")]
LARGE = ["VideoNet", "AudioNet", "make_network", "train_step", "Distiller"]
EXAMPLES = {
    "csc_loss": "csc_loss(P, EVIDENCE, SIMILARITY, CLASSES)",
    "ModalityNoiseFilter": "ModalityNoiseFilter(3, 6)(TEACHER, P[:, None]).evidence",
    "AudioNet": "AudioNet(3, width=2)(rand(2, 40, 64)).logits",
    "VideoNet": "VideoNet(3, width=2)(rand(2, 3, 8, 16, 16)).logits",
    "LogMel": "LogMel()(rand(2, 6400))",
    "retrieval_metrics": "retrieval_metrics(P, TEACHER, CLASSES, CLASSES)"}

def names_in(node):
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}

def code_lines(node):
    lines = ast.get_source_segment(SOURCE, node).splitlines()
    docstring = (ast.get_docstring(node) or "").splitlines()
    return sum(line.strip() != "" for line in lines) - sum(line != "" for line in docstring)

def is_liftable(node):
    section = sum(banner < node.lineno for banner in BANNERS)
    return section in (1, 2, 3, 4, 8) and node.name != "find_seek"

@pytest.mark.parametrize("name", [n for n in DEFINITIONS if is_liftable(DEFINITIONS[n])])
def test_a_function_runs_below_the_imports_with_what_it_calls(name):
    needed, queue = [], [name]
    while queue:
        current = queue.pop()
        if current not in needed:
            needed.append(current)
            queue += names_in(DEFINITIONS[current]) & set(DEFINITIONS)
    parts = [node for other, node in DEFINITIONS.items() if other in needed]
    pasted = {}
    exec(compile(ast.Module(IMPORTS + parts, []), "pasted", "exec"), pasted)
    for part in parts:
        assert not names_in(part) & (set(vars(xmkd)) - set(pasted))     # no globals of the file
    dragged = sum(code_lines(DEFINITIONS[other]) for other in needed[1:])
    assert dragged <= (140 if name in LARGE or name.startswith("decode") else 40)
    if name in EXAMPLES:
        assert eval(EXAMPLES[name], globals() | pasted) is not None

# -------------------- 4. Media --------------------
def write_sound(path, channels, rate=16000, codec="pcm_s16le", gap=(0, 0)):
    """Writes (channels, samples) without the packets that begin in the seconds of `gap`."""
    layout = {1: "mono", 3: "2.1"}[len(channels)]
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.float32(channels), "fltp", layout)
        frame.sample_rate = rate
        frame.pts = 0
        for packet in stream.encode(frame) + stream.encode(None):
            if not gap[0] <= packet.pts * packet.time_base < gap[1]:
                file.mux(packet)
    return path

def write_video(path, count=40, held=0.1, gop=10):
    """Writes pictures, 10 a second. Picture k is 16 + 5 k; its upper left quarter is black."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10, width=64, height=48, pix_fmt="yuv420p")
        stream.codec_context.bit_rate = 2_000_000
        stream.codec_context.gop_size = gop
        stream.codec_context.sample_aspect_ratio = Fraction(2)      # pixels twice as wide as high
        packets = []
        for k in range(count):
            picture = np.full((48, 64, 3), 16 + 5 * k, np.uint8)
            picture[:24, :32] = 0
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts = k
            packets += stream.encode(frame)
        packets += stream.encode(None)
        packets[-1].duration = round(held / packets[-1].time_base)
        file.mux(packets)
    return path

def shown(frames):
    """Returns which pictures of `write_video` came back."""
    corner = frames[:, :, -20:, -20:].float()
    levels = corner.mean((1, 2, 3))
    return ((levels - 16) / 5).round().int().tolist()

def tone(hertz, seconds):
    return 0.6 * np.sin(2 * np.pi * hertz * np.arange(seconds * 16000) / 16000)

@pytest.mark.parametrize("codec", ["pcm_s16le", "pcm_u8", "pcm_s32le", "pcm_f32le", "pcm_f64le"])
def test_mono_is_the_mean_of_the_channels(tmp_path, codec):
    channels = [tone(440, 1), np.zeros(16000), np.zeros(16000)]
    sound = xmkd.decode_audio(write_sound(tmp_path / "a.wav", channels, codec=codec))
    assert len(sound) == 32000
    assert sound[8000:24000].max() == pytest.approx(0.6 / 3, abs=0.005)

@pytest.mark.parametrize("rate", [8000, 22050, 32000, 44100])
def test_a_range_of_sound_begins_at_its_sample(tmp_path, rate):
    click = np.zeros((1, 4 * rate))
    click[0, 3 * rate] = 0.9            # at 3 s, which is 0.75 s = 24,000 samples behind 2.25 s
    sound = xmkd.decode_audio(write_sound(tmp_path / "a.wav", click, rate), 2.25, 3.5)
    assert (len(sound), sound.argmax()) == (40000, 24000)

@pytest.mark.parametrize("name, codec", [("a.mka", "flac"), ("a.m4a", "aac"), ("a.ts", "mp2")])
def test_a_gap_in_the_sound_is_silent_and_the_rest_stays_in_place(tmp_path, name, codec):
    path = write_sound(tmp_path / name, tone(300, 6)[None], codec=codec, gap=(2.0, 4.0))
    sound = xmkd.decode_audio(path, 1.0, 6.0).abs()
    parts = sound.view(50, 3200).amax(1)        # of 0.1 s each
    assert (parts[:9] > 0.3).all()
    assert (parts[12:29] < 0.01).all()          # 2.2 s to 3.9 s
    assert (parts[32:48] > 0.3).all()
    with pytest.raises(xmkd.InputError, match="no audio between 2.5 s and 3.5 s"):
        xmkd.decode_audio(path, 2.5, 3.5)

@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_picture_k_is_the_one_shown_at_start_plus_k_over_fps(tmp_path, name):
    path = write_video(tmp_path / name, gop=25)
    # Picture n is shown from n / 10 s on: at 1.53, 1.78, 2.03, 2.28 s these are 15, 17, 20, 22.
    # In MPEG-TS a seek to 0.53 s lands at the key picture of 2.5 s.
    assert shown(xmkd.decode_video(path, 1.53, 2.53, fps=4)) == [15, 17, 20, 22]
    assert shown(xmkd.decode_video(path, fps=10)) == list(range(40))

@pytest.mark.parametrize("count", [6, 20])
def test_the_kth_picture_has_the_kth_smallest_time(count):
    times = (np.arange(count) ^ 1) / 10         # 0.1, 0.0, 0.3, 0.2, ...: B-frames in AVI
    pictures = [SimpleNamespace(name=k, duration=1, time_base=0.1) for k in range(count)]
    parts = xmkd.show_frames(zip(times, pictures), SimpleNamespace(type="video"))
    for k, (begin, stop, picture) in enumerate(parts):
        assert picture.name == k
        assert begin == pytest.approx(k / 10)
        assert stop == pytest.approx(k / 10 + 0.1)
    assert k == count - 1

def test_the_last_picture_is_shown_as_long_as_the_file_tells(tmp_path):
    path = write_video(tmp_path / "a.mkv", 10, held=2.0)       # 0.9 s, then 2 s
    assert shown(xmkd.decode_video(path, fps=5)) == [0, 2, 4, 6, 8] + 10 * [9]

# The matrix (a, b, c, d) takes (x, y) to (a x + c y, b x + d y): where is the black quarter then?
@pytest.mark.parametrize("a, b, c, d, row, column", [
    (1, 0, 0, 1, 0, 0),
    (-1, 0, 0, 1, 0, 1),
    (0, 1, -1, 0, 0, 1),
    (0, -1, -1, 0, 1, 1)])
def test_pictures_are_turned_and_mirrored_as_players_do(tmp_path, a, b, c, d, row, column):
    path = write_video(tmp_path / "a.mp4")
    content = path.read_bytes()
    at = content.index(b"tkhd") + 44            # the matrix of the track, in units of 1 / 65536
    matrix = 65536 * np.array([a, b, 0, c, d])
    path.write_bytes(content[:at] + matrix.astype(">i4").tobytes() + content[at + 20:])
    assert min(xmkd.decode_video(path, side=24).shape[2:]) == 24
    picture = xmkd.decode_video(path)[-1].float().mean(0)
    assert picture.shape == ((48, 128) if a else (128, 48))     # square pixels, not enlarged
    quarters = picture.unflatten(0, (2, -1)).unflatten(2, (2, -1)).mean((1, 3))
    assert quarters.argmin() == 2 * row + column

@pytest.mark.parametrize("name", ["a.avi", "a.mkv"])
def test_a_file_that_is_shorter_than_its_header_says_is_refused(tmp_path, name):
    path = write_video(tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[:len(content) * 4 // 5])
    assert shown(xmkd.decode_video(path, 0.03, 1.03)) == [0, 2, 5, 7]
    with pytest.raises(xmkd.InputError, match=f"{name}: truncated"):
        xmkd.decode_video(path)

def test_damage_costs_a_clip_only_where_it_is(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        for packet in list(file.demux(video=0))[12:16]:
            content[packet.pos:packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(content)
    assert shown(xmkd.decode_video(path, 2.03, 3.03)) == [20, 22, 25, 27]
    with pytest.raises(xmkd.InputError, match="0.8 s of its video are damaged"):
        xmkd.decode_video(path, 0.5, 3.0)       # from 1.2 s to the next key at 2 s

def test_what_holds_no_sound_is_refused_with_its_path(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "list").write_text("ffconcat version 1.0\nfile good.wav\n")
    write_sound(tmp_path / "good.wav", tone(300, 2)[None])
    write_sound(tmp_path / "nan.wav", np.full((1, 9000), np.nan), codec="pcm_f32le")
    write_video(tmp_path / "silent.mp4")
    for name in ("empty", "list", "nan.wav", "silent.mp4", "none"):
        with pytest.raises(xmkd.InputError, match=f"^{tmp_path}/{name}: "):
            xmkd.decode_audio(tmp_path / name)

def test_the_authors_hdf5_files_hold_a_jpeg_a_frame(tmp_path):
    h5py = pytest.importorskip("h5py")
    with av.open(str(tmp_path / "a.mjpeg"), "w") as file:
        stream = file.add_stream("mjpeg", width=320, height=240, pix_fmt="yuvj420p")
        jpeg = bytes(stream.encode(av.VideoFrame(320, 240, "yuvj420p"))[0])
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        rows = file.create_dataset("video", 3, h5py.vlen_dtype(np.uint8))
        rows[:] = 3 * [np.frombuffer(jpeg, np.uint8)]
    assert xmkd.decode_hdf5(tmp_path / "a.hdf5", side=120).shape == (3, 3, 120, 160)

# -------------------- 5. Data sets: load_stream --------------------
@pytest.mark.parametrize("seconds, cut, loud", [(6, None, 1), (40, None, 21), (40, True, 1)])
def test_load_stream_tells_by_its_length_whether_a_file_is_cut(tmp_path, seconds, cut, loud):
    sound = 0.01 * tone(300, seconds)
    sound[16000 * loud:16000 * (loud + 1)] *= 50            # one second is loud: the clip's second
    path = write_sound(tmp_path / "a.aac", sound[None], codec="aac")    # ADTS tells no length
    clip = xmkd.Clip("a", (0,), "train", audio=str(path), start=20.0, end=26.0, cut=cut)
    decoded = xmkd.load_stream(clip, "audio")
    assert len(decoded) / 32000 == pytest.approx(40 if cut else 6, abs=0.15)
    assert decoded[38400:60800].abs().max() > 0.2           # 1.2 s to 1.9 s
    assert decoded[70400:].abs().max() < 0.02

def test_load_stream_refuses_a_length_that_tells_nothing(tmp_path):
    path = write_sound(tmp_path / "a.wav", tone(300, 8)[None])
    clip = xmkd.Clip("a", (0,), "train", audio=str(path), start=20.0, end=26.0)
    with pytest.raises(xmkd.InputError, match="its 8.0 s may be the recording or the part from 20"):
        xmkd.load_stream(clip, "audio")

# -------------------- Media that others made --------------------
@needs_testdata
def test_media_from_the_field_are_right_or_refused():
    field = Path(TESTDATA) / "field"
    run = subprocess.run([sys.executable, field / "check_field.py", field], capture_output=True,
                         text=True, cwd=Path(xmkd.__file__).parent)
    assert run.returncode == 0, run.stdout

@needs_testdata
def test_clips_of_torchcodec_have_all_their_pictures_and_samples():
    clips = Path(TESTDATA) / "clips"
    facts = json.loads((clips / "clips.json").read_text())
    for name in ("nasa_13013.mp4", "nasa_13013_hdr.mp4", "av1_video.mkv", "testsrc2_vp9.webm"):
        frames = xmkd.decode_video(clips / name, fps=facts[name]["fps"], side=64)
        assert len(frames) == facts[name]["n_frames"]
    for name in ("nasa_13013.mp4", "nasa_13013.mp4.audio_44100.mp3", "sine_stereo_mp2.mpg"):
        seconds = facts[name]["n_samples"] / facts[name]["sample_rate"]
        assert len(xmkd.decode_audio(clips / name)) == pytest.approx(32000 * seconds, abs=32)

# -------------------- 5. Data sets --------------------
def tree(root, names="", texts={}):
    """Makes empty files, whose names are separated by spaces, and files with texts."""
    for name, text in {**dict.fromkeys(names.split(), ""), **texts}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    return root

def write_film(path, picture=True, sound=True):
    """Writes a tenth of a second of grey pictures and silence."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = {}
    with av.open(str(path), "w") as container:
        if picture:
            stream = container.add_stream("mpeg4", rate=10, width=32, height=32, pix_fmt="yuv420p")
            frames[stream] = av.VideoFrame(32, 32, "yuv420p")
        if sound:
            silence = np.zeros((1, 3200), np.float32)
            stream = container.add_stream("mp3", rate=32000)
            frames[stream] = av.AudioFrame.from_ndarray(silence, "fltp", "mono")
            frames[stream].rate = 32000
        for stream, frame in frames.items():
            container.mux(stream.encode(frame) + stream.encode(None))

def audioset(root, train, split="balanced"):
    """Writes AudioSet's lists, with these training rows, and the file of one evaluation clip."""
    labels = 'index,mid,display_name\r\n0,/m/1,"One, first"\r\n1,/m/2,"Two"\r\n'
    return tree(root, "eval/Ybbbbbbbbbb0.wav", {
        "metadata/class_labels_indices.csv": labels, f"metadata/{split}_train_segments.csv": train,
        "metadata/eval_segments.csv": '# Segments\nbbbbbbbbbb0, 0.000, 10.000, "/m/1"\n'})

def files_of(clip):
    """Returns the names of a clip's two files, without their folders."""
    return [path and os.path.basename(path) for path in (clip.audio, clip.video)]

@pytest.mark.parametrize("ytid", ["-a_b-c_d-e_", "Y1234567890", "v_-abcdefgh"])
@pytest.mark.parametrize("name, cut", [
    ("Y{}.wav", None), ("{}.FLAC", None), ("id_{}.m4a", None), ("{}.p0.mp4", None),
    ("v_{}.mp4", None), ("{}_30000_40000.flac", True), ("{}_30.0-40.0.ogg", True),
    ("Y{}_30.000_40.000.wav", True), ("Y{}_30000.wav", True), ("{}_30.wav", True),
    ("v{}_30_40_out.mkv", True), ("{}_2.wav", None)])
def test_audioset_files_are_found_by_id_in_every_naming_scheme(tmp_path, ytid, name, cut):
    audioset(tmp_path, f'{ytid}, 30.000, 40.000, "/m/1,/m/2"\n')
    tree(tmp_path, name.format(ytid))
    clips, classes = xmkd.read_audioset(tmp_path)
    assert classes == ["One, first", "Two"] and clips[0][:3] == (ytid, (0, 1), "train")
    assert clips[0][5:] == (30, 40, cut) and clips[0].audio == str(tmp_path / name.format(ytid))
    assert (clips[0].video is None) == name.lower().endswith((".wav", ".flac", ".m4a", ".ogg"))

@pytest.mark.parametrize("text", ['\ufeffaaaaaaaaaa0, 0.000, 10.000, "/m/1,/m/2"\r\n\r\n',
                                  '"# YTID",,,\naaaaaaaaaa0,0,10,"""/m/1,/m/2""",,\n'])
def test_audioset_lists_that_a_spreadsheet_has_saved_are_read(tmp_path, text):
    clips, _ = xmkd.read_audioset(tree(audioset(tmp_path, text), "aaaaaaaaaa0.wav"))
    assert clips[0][:3] == ("aaaaaaaaaa0", (0, 1), "train") and clips[0][5:7] == (0, 10)

@pytest.mark.parametrize("row, reason", [
    ("aaaaaaaaaa0, 0, 10, /m/9", "unknown label '/m/9'"), ("aaaaaaaaaa0, 9, 5, /m/1", "expected"),
    ("#NAME?, 0, 10, /m/1", "expected"), ("aaaaaaaaaa0; 0; 10; /m/1", "expected")])
def test_a_wrong_row_of_an_audioset_list_is_named_by_file_and_line(tmp_path, row, reason):
    with pytest.raises(xmkd.InputError, match=f"balanced_train_segments.csv:2: {reason}"):
        xmkd.read_audioset(audioset(tmp_path, "# YTID\n" + row))

def test_missing_and_repeated_clips_are_reported_and_the_share_found_is_told(tmp_path):
    rows = [f"aaaaaaaaaa{k}, 0, 10, /m/1\n" for k in (0, 1, 0)]
    audioset(tmp_path, "".join(rows), split="unbalanced")
    tree(tmp_path, "AAAAAAAAAA1.wav .a/aaaaaaaaaa1.wav A/aaaaaaaaaa0.wav B/aaaaaaaaaa0.wav")
    os.symlink(tmp_path, tmp_path / "loop")
    tree(tmp_path, "metadata/._eval_segments.csv ._aaaaaaaaaa1.wav")    # of a Mac's archive
    assert len(xmkd.find_media(tmp_path)) == 4              # neither hidden ones nor any twice
    skipped = []
    layout, clips, _ = xmkd.read_data(tmp_path, split="unbalanced", skipped=skipped)
    assert layout == "audioset" and files_of(clips[0]) == ["aaaaaaaaaa0.wav", None]
    assert skipped == [("aaaaaaaaaa1", "missing: no file has the name of this training clip"),
                       ("aaaaaaaaaa0", "listed twice: the first row counts")]
    assert xmkd.coverage(clips, skipped).startswith("found 1 of 2 training clips (50.0 %)")

def test_data_that_cannot_be_used_says_why(tmp_path):
    audioset(tmp_path / "a", "aaaaaaaaaa0, 0, 10, /m/1\n")
    (tmp_path / "b").mkdir()
    tree(tmp_path / "c", texts={"clips.csv": "id,split,labels\na,train,dog\nb,test,dog\n"})
    for folder, split, reason in (
            ("a", "balanced", "train split is empty; found 0 of 1 training"),
            ("a", "unbalanced", "no unbalanced_train_segments.csv"),
            ("b", "balanced", "clips.csv.*classInd.txt.*annotation.json.*val"),
            ("c", "balanced", "clips.csv:3: expected id,split,labels")):
        with pytest.raises(xmkd.InputError, match=reason):
            xmkd.read_data(tmp_path / folder, split)
    (tmp_path / "a/eval/Ybbbbbbbbbb0.wav").rename(tmp_path / "a/other.wav")
    with pytest.raises(xmkd.InputError, match="none of the 2 .*a0.*bbbbbbbbbb0.*other.wav"):
        xmkd.read_data(tmp_path / "a")

def test_the_content_tells_which_file_of_a_clip_holds_sound_and_which_pictures(tmp_path):
    pair, folders, whole, cut = ids = [f"aaaaaaaaaa{k}" for k in range(4)]
    audioset(tmp_path, "".join(f"{name}, 30, 40, /m/1\n" for name in ids))
    write_film(tmp_path / f"{pair}.f137.mp4", sound=False)              # yt-dlp's pair
    write_film(tmp_path / f"{pair}.f251.mkv", picture=False)
    write_film(tmp_path / f"audio/{folders}.mp4", picture=False)        # one name in two folders
    write_film(tmp_path / f"video/{folders}.mp4", sound=False)
    write_film(tmp_path / f"{whole}.mp4")                               # beside what is left of it
    tree(tmp_path, f"{whole}.f140.m4a {cut}_30_40.flac video/{cut}_30_40.mp4 a/{cut}.wav")
    clips, _ = xmkd.read_audioset(tmp_path, skipped=(skipped := []))
    assert files_of(clips[0]) == [f"{pair}.f251.mkv", f"{pair}.f137.mp4"]
    assert clips[1].audio == str(tmp_path / f"audio/{folders}.mp4")
    assert clips[1].video == str(tmp_path / f"video/{folders}.mp4")
    assert files_of(clips[2]) == [f"{whole}.mp4", f"{whole}.mp4"]
    assert files_of(clips[3]) == [f"{cut}_30_40.flac", f"{cut}_30_40.mp4"] and clips[3].cut
    left = [os.path.basename(path) for path, _ in skipped]
    assert left == [f"{whole}.f140.m4a", f"{cut}.wav"]

def test_ucf101_is_read_whatever_its_case_and_line_ends_and_only_where_it_has_sound(tmp_path):
    tree(tmp_path, """UCF-101/Typing/v_Typing_g01_c02.avi UCF-101/Biking/v_Biking_g08_c01.avi
         UCF-101/HandstandPushups/v_HandstandPushups_g08_c01.avi""", {
        "lists/classInd.txt": "37 HandstandPushups\r\n95 Typing\r\n11 Biking\r\n",
        "lists/trainlist02.txt": "HandstandPushups/v_HandStandPushups_g08_c01.avi 37\r\n"
                                 "Biking/v_Biking_g08_c01.avi 11\r\n",
        "lists/testlist02.txt": "Typing/v_Typing_g01_c01.avi\r\n"
                                "Typing/v_Typing_g01_c02.avi 95\r\n"})
    layout, clips, classes = xmkd.read_data(tmp_path, fold=2, skipped=(skipped := []))
    assert layout == "ucf101" and classes == ["HandstandPushups", "Typing"]
    assert clips[0][:3] == ("v_HandStandPushups_g08_c01", (0,), "train")
    assert clips[1][:3] == ("v_Typing_g01_c02", (1,), "eval") and len(clips) == 2
    assert [name for name, _ in skipped] == ["v_Typing_g01_c01"]
    tree(tmp_path, texts={"lists/testlist02.txt": "Typping/v_Typing_g01_c01.avi\n"})
    with pytest.raises(xmkd.InputError, match="testlist02.txt:1: unknown label 'typping'"):
        xmkd.read_ucf101(tmp_path, fold=2)

def test_activitynet_segments_are_clips_cut_out_or_parts_of_the_whole_video(tmp_path):
    notes = [{"label": "Surf", "segment": [1.5, 9]}, {"label": "Archery", "segment": [20, 31]}]
    database = {name: {"subset": "training", "annotations": notes} for name in ("aaaaaaaaaa0", "x")}
    database["-bbb"] = {"subset": "validation", "annotations": notes[:1]}
    database["c"] = {"subset": "testing", "annotations": []}
    tree(tmp_path, "v_aaaaaaaaaa0.mkv -bbb.mp4 v_x_1.mp4 v_c.mp4 v_x.hdf5",
         {"activity_net.v1-3.min.json": json.dumps({"database": database})})
    layout, clips, classes = xmkd.read_data(tmp_path, skipped=(skipped := []))
    assert layout == "activitynet" and classes == ["Archery", "Surf"]
    assert [(clip.id, clip.labels, files_of(clip)[1], *clip[5:]) for clip in clips] == [
        ("v_aaaaaaaaaa0_0", (1,), "v_aaaaaaaaaa0.mkv", 1.5, 9, False),
        ("v_aaaaaaaaaa0_1", (0,), "v_aaaaaaaaaa0.mkv", 20, 31, False),
        ("v_x_1", (0,), "v_x_1.mp4", 20, 31, True), ("v_-bbb_0", (1,), "-bbb.mp4", 1.5, 9, False)]
    assert [name for name, _ in skipped] == ["v_x_0"]

def test_the_authors_release_has_its_own_order_of_classes_and_frames_without_sound(tmp_path):
    database = {"v_HandStand_g1": {"subset": "training", "label": "Zoo"},
                "v_Ant_g2": {"subset": "validation", "label": "Ant"}}
    tree(tmp_path, "v_Handstand_g1.hdf5 v_Ant_g2.hdf5 Ant/v_Ant_g2.npy",
         {"annotation.json": json.dumps({"labels": ["Zoo", "Ant"], "database": database})})
    layout, (clip, _), classes = xmkd.read_data(tmp_path)
    assert layout == "release" and classes == ["Zoo", "Ant"]
    assert clip[:2] == ("v_HandStand_g1", (0,)) and files_of(clip) == [None, "v_Handstand_g1.hdf5"]

def test_files_of_one_name_are_a_pair_or_two_recordings(tmp_path):
    tree(tmp_path, "train/cat/pair.mp4 train/cat/pair.wav train/stray.mp4 val/dog/x/1.mkv")
    for name in ("a.mp4", "a.avi", "b.mp4", "b.temp.mp4"):
        write_film(tmp_path / "val/dog" / name)
    write_film(tmp_path / "val/dog/c.f137.mp4", sound=False)
    write_film(tmp_path / "val/dog/c.f251.mkv", picture=False)
    layout, clips, classes = xmkd.read_data(tmp_path, skipped=(skipped := []))
    assert layout == "folder" and classes == ["cat", "dog"]
    assert {clip.id: files_of(clip) for clip in clips} == {
        "train/cat/pair": ["pair.wav", "pair.mp4"], "val/dog/x/1": ["1.mkv", "1.mkv"],
        "val/dog/a.avi": ["a.avi", "a.avi"], "val/dog/a.mp4": ["a.mp4", "a.mp4"],
        "val/dog/b": ["b.mp4", "b.mp4"], "val/dog/c": ["c.f251.mkv", "c.f137.mp4"]}
    assert [clip.split for clip in clips] == ["train"] + 5 * ["eval"]
    assert [os.path.basename(path) for path, _ in skipped] == ["stray.mp4", "b.temp.mp4"]

def test_any_list_is_read_as_clips_csv(tmp_path):
    tree(tmp_path, "media/2.mp4 a/1.webm b/1.webm", {
        "clips.csv": '\ufeffid,split,labels,start,end\r\na/1,train,"dog; loud, cat",,\r\n'
                     "b/1,eval,dog,30,40\r\n2,eval,dog,5,\r\n"})
    layout, clips, classes = xmkd.read_data(tmp_path)
    assert layout == "list" and classes == ["dog", "loud, cat"]
    assert [(*clip[:3], files_of(clip)[1], *clip[5:]) for clip in clips] == [
        ("a/1", (0, 1), "train", "1.webm", 0, None, False),
        ("b/1", (0,), "eval", "1.webm", 30, 40, False),
        ("2", (0,), "eval", "2.mp4", 5, None, False)]

@needs_testdata
def test_the_published_lists_are_read_whole(tmp_path):
    shutil.copytree(TESTDATA / "metadata/audioset", tmp_path / "a", copy_function=os.symlink)
    tree(tmp_path / "a", "Y--PJHxphWEs.wav --4gqARaEJE.wav")
    _, clips, classes = xmkd.read_data(tmp_path / "a", skipped=(skipped := []))
    counts = "found 1 of 22,160 training clips (0.0 %) and 1 of 20,371 evaluation clips (0.0 %)"
    assert len(classes) == 527 and xmkd.coverage(clips, skipped) == counts
    lists = shutil.copytree(TESTDATA / "metadata/ucf101", tmp_path / "u") / "ucfTrainTestlist"
    rows = (lists / "trainlist01.txt").read_text() + (lists / "testlist01.txt").read_text()
    tree(tmp_path / "u", " ".join(row for row in rows.split() if row.endswith(".avi")))
    _, clips, _ = xmkd.read_data(tmp_path / "u")
    assert len(clips) == 6845 and sum(clip.split == "train" for clip in clips) == 4901
    for name, layout, train in (("activitynet", "activitynet", 15232), ("ucf51", "release", 4892)):
        text = (TESTDATA / f"metadata/authors/{name}_annotation.json").read_text()
        names = [f"{key}.hdf5" for key in json.loads(text)["database"]]
        tree(tmp_path / name, " ".join(names), {"annotation.json": text})
        found, clips, _ = xmkd.read_data(tmp_path / name)
        assert found == layout and sum(clip.split == "train" for clip in clips) == train

# Options that make a run on the fixture `demo` take a second or two.
SMALL = ["--width", 2, "--frames", 1, "--fps", 1, "--size", 32, "--frame-side", 40, "--seconds", 1,
         "--epochs", 2, "--teacher-epochs", 1, "--batch-size", 8, "--eval-every", 1, "--workers", 0]

@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A small data set: 40 training and 20 evaluation clips of 20 classes, with clips.csv."""
    root = tmp_path_factory.mktemp("data") / "demo"
    xmkd.write_demo(root, "video", False, 0.3, 0.2, seed=1, train=40, evaluation=20)
    return root

def main(*options):
    """Runs the command line at a small size; clips are cached beside the data."""
    options = SMALL + list(options)
    if "--cache" not in options:
        options += ["--cache", Path(str(options[options.index("--data") + 1])).parent / "cache"]
    return xmkd.main([str(option) for option in options])

def run_torchrun(count, *command):
    """Runs a script in several processes, which must succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(xmkd.__file__).parent)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count]
    done = subprocess.run(launch + [str(part) for part in command], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

# -------------------- 7. Cache and views --------------------
def test_even_and_sliding_windows_worked_by_hand():
    # even windows of 4 in 11 frames: stride ceil((11 - 1 - 4) / 2) = 3, so they begin at 0, 3, 6
    assert [w[0] for w in xmkd.even_windows(11, 4, 3)] == [0, 3, 6]
    assert xmkd.even_windows(2, 4, 3) == [[0, 1, 0, 1]]
    assert xmkd.sliding_windows(6, 4, 4) == [[0, 1, 2, 3], [4, 5, 4, 5]]

@needs_testdata
def test_windows_are_the_authors():
    known = json.loads((TESTDATA / "parity" / "temporal_sampling.json").read_text())
    ...

def test_packed_frames_come_back_nearly_equal_and_in_order():
    frames = torch.zeros(3, 3, 16, 24, dtype=torch.uint8)
    frames[1], frames[2, 0] = 120, 200
    stream = xmkd.pack_frames(frames)
    assert stream["bounds"][0] == 0 and stream["bounds"][-1] == len(stream["jpegs"])
    back = xmkd.unpack_frames(stream, [2, 0, 2])
    assert back.shape == (3, 3, 16, 24)
    assert (back.int() - frames[[2, 0, 2]].int()).abs().max() <= 3

def test_a_clip_is_decoded_once_and_again_when_its_file_changes(tmp_path, demo):
    clip = xmkd.Clip("a", (0,), "train", *[str(demo / "0000.avi")] * 2, cut=True)
    views = xmkd.Views("video", fps=1.0, side=40)
    file = Path(xmkd.decode_clip(clip, views, tmp_path))
    written = file.stat().st_mtime_ns
    assert xmkd.decode_clip(clip, views, tmp_path) == str(file)
    assert file.stat().st_mtime_ns == written
    os.utime(demo / "0000.avi", (1, 1))
    assert xmkd.decode_clip(clip, views, tmp_path) != str(file)
    assert xmkd.decode_clip(clip, views._replace(side=32), tmp_path) != str(file)

def test_only_training_clips_need_the_teachers_modality(tmp_path, demo):
    path = str(demo / "0001.avi")
    views = [xmkd.Views("video", side=40), xmkd.Views("audio")]
    train = xmkd.Clip("t", (0,), "train", None, path, cut=True)
    clips = [train, train._replace(split="eval"), train._replace(video="nowhere.avi")]
    decoded = xmkd.decode_all(clips, views, tmp_path, workers=0)
    assert decoded[0] == ([], "missing: t has no file with audio")
    assert decoded[1][0][1] == "" and Path(decoded[1][0][0]).exists() and decoded[1][1] == ""
    assert "nowhere.avi" in decoded[2][1]

def read_windows(demo, cache, kind, mode, epoch=1, seed=3, **more):
    clips, classes = xmkd.read_list(demo)
    views = xmkd.Views(kind, frames=2, fps=4.0, size=32, seconds=0.6, side=40, **more)
    files = [files[0] for files, _ in xmkd.decode_all(clips[:4], [views], cache, 0)]
    data = xmkd.Data(clips[:4], classes, False, [0, 1, 2, 3], [], views, files)
    dataset = xmkd.ClipViews(data, [2, 3], mode, seed)
    dataset.epoch.fill_(epoch)
    return dataset[1]

@pytest.mark.parametrize("kind", ["video", "audio"])
def test_training_windows_follow_from_seed_and_epoch_alone(tmp_path, demo, kind):
    index, first, label, _ = read_windows(demo, tmp_path, kind, "train")
    torch.rand(5)                                       # the state of torch's generator has no say
    assert torch.equal(read_windows(demo, tmp_path, kind, "train")[1], first)
    assert not torch.equal(read_windows(demo, tmp_path, kind, "train", epoch=2)[1], first)
    assert not torch.equal(read_windows(demo, tmp_path, kind, "train", seed=4)[1], first)
    assert index == 3 and label == xmkd.read_list(demo)[0][3].labels[0]

def test_windows_have_the_shapes_that_the_networks_take(tmp_path, demo):
    assert read_windows(demo, tmp_path, "video", "train")[1].shape == (1, 2, 3, 32, 32)
    assert read_windows(demo, tmp_path, "video", "test")[1].shape == (2, 2, 3, 32, 32)
    # one second of sound in windows of 0.6 s: the rest of 0.4 s is more than half, so it is looped
    sound = read_windows(demo, tmp_path, "audio", "test")[1]
    assert sound.shape == (2, 19200) and sound.dtype == torch.int16
    assert torch.equal(sound[1, 12800:], sound[1, :6400])

def test_strong_windows_are_grey(tmp_path, demo):
    windows = read_windows(demo, tmp_path, "video", "train", strong=True)[1]
    assert torch.equal(windows[:, :, 0], windows[:, :, 1])
    assert not torch.equal(*read_windows(demo, tmp_path, "video", "train")[1][0, 0, :2])

def test_a_last_batch_is_left_out_unless_it_is_the_only_one(tmp_path, demo):
    clips, classes = xmkd.read_list(demo)
    data = xmkd.Data(clips, classes, False, list(range(7)), [], xmkd.Views("audio"), [""] * 99)
    assert len(data.loader(data.train, "train", 3, 0)) == 2
    assert len(data.loader(data.train, "train", 8, 0)) == 1
    assert len(data.loader(data.train, "test", 3, 0)) == 3

# -------------------- 9. Checkpoints --------------------
def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    xmkd.save(tmp_path / "a.pt", {"x": 1})
    with pytest.raises(xmkd.InputError, match="a.pt"):
        monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("full")))
        xmkd.save(tmp_path / "a.pt", {"x": 2})
    assert torch.load(tmp_path / "a.pt") == {"x": 1}
    assert os.listdir(tmp_path) == ["a.pt"]

def authors_file(path, prefix="module."):
    """Writes a checkpoint as the authors' code does, with a pickled scheduler and optimizer."""
    student, noise_filter = xmkd.VideoNet(5, width=2), xmkd.ModalityNoiseFilter(5, 16)
    optimizer = torch.optim.Adam(student.parameters(), weight_decay=5e-4)
    sum(p.sum() for p in student.parameters()).backward()
    optimizer.step()
    torch.save({
        "epoch": 7, "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [150]),
        "state_dict": {prefix + k: v for k, v in student.state_dict().items()},
        "audio_state_dict": {prefix + k: v for k, v in noise_filter.state_dict().items()}}, path)
    return student, noise_filter

@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_the_authors_checkpoints_load(tmp_path, prefix):
    student, noise_filter = authors_file(tmp_path / "a.pth", prefix)
    saved = xmkd.load_checkpoint(tmp_path / "a.pth")
    inputs = torch.rand(2, 3, 2, 32, 32)
    found = xmkd.restore(saved, "cpu").eval()(inputs).logits
    assert torch.equal(found, student.eval()(inputs).logits)
    noise_filter.load_state_dict(saved["filter"])
    assert (saved["epoch"], saved["method"], saved["classes"]) == (7, "xmkd", None)

@pytest.mark.parametrize("stages, dim", [(4, 512), (6, 512), (6, 2048)])
def test_panns_checkpoints_load(tmp_path, stages, dim):
    network = xmkd.AudioNet(527, 2, stages, dim)
    state = {**network.state_dict(), "logmel_extractor.melW": torch.zeros(513, 64)}
    torch.save({"iteration": 1, "model": state}, tmp_path / "Cnn.pth")
    saved = xmkd.load_checkpoint(tmp_path / "Cnn.pth")
    assert saved["network"] == {"kind": "audio", "num_classes": 527, "dim": dim, "width": 2,
                                "stages": stages}
    xmkd.restore(saved, "cpu")
    state["logmel_extractor.melW"] = torch.zeros(257, 64)
    torch.save({"model": state}, tmp_path / "Cnn14_16k.pth")
    with pytest.raises(xmkd.InputError, match="sample rate"):
        xmkd.load_checkpoint(tmp_path / "Cnn14_16k.pth")

class Evil:
    def __reduce__(self):
        return os.mkdir, ("was_run",)

@pytest.mark.parametrize("content", [Evil(), {"model": {}}, [1], "text", None])
def test_what_is_no_checkpoint_is_refused_and_never_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "a.pt")
    with pytest.raises(xmkd.InputError, match="a.pt"):
        xmkd.load_checkpoint("a.pt")
    assert not os.path.exists("was_run")

def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    state = xmkd.VideoNet(5, width=2).state_dict()
    state["cls.bias"][0] = math.nan
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    with pytest.raises(xmkd.InputError, match="cls.bias"):
        xmkd.load_checkpoint(tmp_path / "a.pt")

# -------------------- 10. to 13. Training, teacher, prediction, command line --------------------
def test_each_task_trains_on_files_and_leaves_what_it_promises(tmp_path, demo):
    first = {"audio_tagging": "mAP", "action_recognition": "top1", "video_retrieval": "R@1"}
    for task, metric in first.items():
        out = tmp_path / task
        assert main("--data", demo, "--task", task, "--out", out, "--method", "xmkd") == 0
        names = {"config.json", "log.jsonl", "best.pt", "last.pt", "results.json", "skipped.csv"}
        assert names <= set(os.listdir(out))
        results = json.loads((out / "results.json").read_text())
        assert list(results["metrics"])[0] == metric and 0 <= results["metrics"][metric] <= 1
        assert results["clips"] == {"train": 40, "eval": 20} and results["epoch"] in (1, 2)
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert [row["epoch"] for row in rows] == [1, 2]
        assert {"csc", "cosine", "gate", "entropy", "clips_per_second"} <= set(rows[0])
        assert [row["lr"] for row in rows] == [3e-4, 3e-4]

def test_all_methods_share_a_teacher_and_stand_in_one_table(tmp_path, demo, capsys):
    out = tmp_path / "all"
    assert main("--data", demo, "--out", out, "--method", "all", "--seeds", 2, "--epochs", 1) == 0
    table = json.loads((out / "results.json").read_text())["table"]
    assert set(table) == {"teacher", *xmkd.METHODS}
    assert [len(runs) for runs in table.values()] == [1] + [2] * 8
    printed = capsys.readouterr().out
    assert "xmkd - student" in printed and "±" in printed
    assert len({str(torch.load(out / f"{m}-s4" / "last.pt")["seed"]) for m in table if m != "teacher"}) == 1

def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, demo, monkeypatch):
    options = "--data", demo, "--method", "xmkd", "--epochs", 3
    assert main(*options, "--out", tmp_path / "a") == 0
    train_epoch, calls = xmkd.train_epoch, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 3:                             # in the second epoch of the student
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    monkeypatch.setattr(xmkd, "train_epoch", stop)
    assert main(*options, "--out", tmp_path / "b", "--resume") == 130
    assert main(*options, "--out", tmp_path / "b", "--resume", "--workers", 1) == 0
    one, two = [torch.load(tmp_path / name / "last.pt") for name in "ab"]
    for name, value in one["student"].items():
        assert torch.equal(value, two["student"][name])
    one, two = [json.loads((tmp_path / name / "results.json").read_text()) for name in "ab"]
    assert {**one, "seconds": 0} == {**two, "seconds": 0}

def test_resume_refuses_changed_settings_by_name(tmp_path, demo, capsys):
    options = "--data", demo, "--method", "student", "--epochs", 1, "--out", tmp_path
    assert main(*options) == 0
    for change, name in (("--lr", "1e-4"), "lr"), (("--seed", "4"), "seed"), (("--method", "xmkd"), "method"):
        assert main(*options, "--resume", *change) == 2
        assert f"--resume: {name} was" in capsys.readouterr().err
    assert main(*options, "--resume") == 0

def test_a_loss_that_is_not_finite_names_step_and_clips(tmp_path, demo, monkeypatch, capsys):
    step = xmkd.train_step
    monkeypatch.setattr(xmkd, "train_step", lambda *a: {k: v * math.nan for k, v in step(*a).items()})
    assert main("--data", demo, "--method", "student", "--out", tmp_path) == 2
    assert "not finite in step 1 of epoch 1" in capsys.readouterr().err

def test_per_class_draws_the_same_clips_for_every_method():
    clips = [xmkd.Clip(str(i), (i % 3,), "train") for i in range(30)] + [xmkd.Clip("e", (0,), "eval")]
    chosen = xmkd.limit_classes(clips, 4, seed=3)
    assert chosen == xmkd.limit_classes(clips, 4, seed=3) != xmkd.limit_classes(clips, 4, seed=4)
    assert len(chosen) == 13 and chosen[-1].id == "e"

def test_shuffled_embeddings_go_to_other_training_clips(tmp_path, demo, monkeypatch):
    seen = []
    fit = xmkd.fit
    monkeypatch.setattr(xmkd, "fit", lambda *a, **k: seen.append(a) or fit(*a, **k))
    options = "--data", demo, "--method", "csc", "--epochs", 1
    assert main(*options, "--out", tmp_path / "a") == 0
    assert main(*options, "--out", tmp_path / "b", "--shuffle-teacher",
                "--teacher", tmp_path / "a" / "teacher.pt") == 0
    data, plain, mixed = seen[1][1], seen[1][4], seen[2][4]
    assert torch.equal(plain[data.eval], mixed[data.eval])
    assert not torch.equal(plain[data.train], mixed[data.train])
    assert torch.equal(plain[data.train].sum(0).round(decimals=3), mixed[data.train].sum(0).round(decimals=3))

def test_embeddings_of_any_width_come_from_a_folder(tmp_path, demo):
    clips, _ = xmkd.read_list(demo)
    for clip in clips[2:]:
        np.save(tmp_path / f"{clip.id}.npy", np.full(7, len(clip.id), np.float64))
    out = tmp_path / "out"
    assert main("--data", demo, "--teacher", tmp_path, "--method", "xmkd", "--epochs", 1, "--out", out) == 0
    assert torch.load(out / "teacher.pt")["embeddings"].shape == (58, 7)
    assert (out / "skipped.csv").read_text().count("no embedding") == 2
    np.save(tmp_path / f"{clips[5].id}.npy", np.zeros((2, 2)))
    with pytest.raises(xmkd.InputError, match=r"\(2, 2\)"):
        xmkd.read_features(tmp_path, clips)

class Echo(nn.Module):
    """Stands for r2plus1d_18: returns the mean of each colour that it gets."""
    def __init__(self):
        super().__init__()
        self.fc = nn.Identity()

    def forward(self, frames):
        return frames.mean((2, 3, 4))

def test_the_kinetics_teacher_sees_colours_as_it_was_trained_to(monkeypatch):
    monkeypatch.setattr(xmkd, "r2plus1d_18", lambda weights, progress: Echo())
    grey = torch.full((1, 2, 3, 8, 8), 128, dtype=torch.uint8)
    features = xmkd.KineticsTeacher()(xmkd.Prepare()(grey))
    # torchvision normalises this network's input by these numbers
    mean, std = torch.tensor([0.43216, 0.394666, 0.37645]), torch.tensor([0.22803, 0.22145, 0.216989])
    close(features.pooled[0], (128 / 255 - mean) / std)
    assert features.map.shape == (1, 1, 3)

def test_without_a_network_the_teacher_is_trained_from_scratch(tmp_path, demo, monkeypatch, capsys):
    def offline(weights, progress):
        raise OSError("no route to host")

    monkeypatch.setattr(xmkd, "r2plus1d_18", offline)
    assert main("--data", demo, "--task", "audio_tagging", "--teacher", "auto", "--method", "kd",
                "--epochs", 1, "--out", tmp_path) == 0
    assert "no route to host" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["teacher"]["kind"] == "trained from scratch"

def test_a_checkpoint_evaluates_to_the_same_metrics_and_refuses_other_classes(tmp_path, demo, capsys):
    out = tmp_path / "run"
    assert main("--data", demo, "--method", "student", "--epochs", 1, "--out", out) == 0
    file = out / "last.pt"
    assert xmkd.main(["--checkpoint", str(file), "--workers", "0", "--cache", str(demo.parent / "cache"),
                      "--out", str(tmp_path / "e")]) == 0
    one, two = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "e")]
    assert one["metrics"] == pytest.approx(two["metrics"], abs=1e-6)
    authors_file(tmp_path / "a.pth")
    assert main("--data", demo, "--checkpoint", tmp_path / "a.pth", "--out", tmp_path / "e") == 2
    assert "has 5 classes" in capsys.readouterr().err

def test_predict_prints_classes_or_the_nearest_clips_and_names_bad_files(tmp_path, demo, capsys):
    assert main("--data", demo, "--method", "student", "--epochs", 1, "--out", tmp_path) == 0
    capsys.readouterr()
    ask = ["--checkpoint", str(tmp_path / "last.pt"), "--cache", str(demo.parent / "cache"), "--workers", "0"]
    (tmp_path / "bad.mp4").write_bytes(b"<html>")
    files = [str(demo / "0003.avi"), str(tmp_path / "bad.mp4")]
    assert xmkd.main(ask + ["--predict", *files]) == 2
    printed, error = capsys.readouterr()
    lines = printed.splitlines()
    assert lines[0] == files[0] and lines[6:] == [files[1], lines[7]] and "error" in lines[7]
    assert error == "error: 1 of 2 files could not be used\n"
    assert xmkd.main(ask + ["--predict", files[0], "--gallery", str(demo)]) == 0
    nearest = capsys.readouterr().out.splitlines()[1:]
    scores = [float(line.split()[0]) for line in nearest]
    assert len(nearest) == 5 and scores == sorted(scores, reverse=True)
    assert files[0] not in "".join(nearest)             # a file is not its own neighbour

@pytest.mark.parametrize("options, message", [
    (["--data", "nowhere"], "nowhere: there is no such folder"),
    (["--lr", "nan"], "--lr: nan is not a number from 0 to 10"),
    (["--epochs", "0"], "0 is not a number from 1"),
    (["--methods", "csc"], "unrecognized arguments"),
    (["--method", "csc,csc"], "each once"),
    (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
    (["--predict", "a.mp4"], "--predict needs --checkpoint"),
    (["--checkpoint", "a.pt"], "a.pt is not a usable checkpoint"),
    (["--teacher", "nowhere"], "--teacher nowhere is not"),
    (["--amp", "--device", "cpu"], "--amp is for GPUs")])
def test_bad_options_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert xmkd.main(options) == 2
    printed, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert os.listdir(tmp_path) == []                   # before anything is written

def test_a_rank_without_torchrun_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert xmkd.main(["--out", str(tmp_path)]) == 2
    assert "RANK or WORLD_SIZE in the environment" in capsys.readouterr().err

def test_unreadable_clips_are_skipped_with_a_reason_up_to_a_share(tmp_path, demo, capsys):
    folder = tmp_path / "data"
    shutil.copytree(demo, folder)
    for name in "0000.avi", "0001.avi", "0050.avi":
        (folder / name).write_bytes(b"no video")
    options = "--data", folder, "--method", "student", "--epochs", 1, "--out", tmp_path / "o"
    assert main(*options) == 0
    rows = list(csv.DictReader(open(tmp_path / "o" / "skipped.csv")))
    assert [row["path"] for row in rows] == ["0000", "0001", "0050"]
    assert all("cannot be decoded" in row["reason"] for row in rows)
    assert main(*options, "--max-skipped", "0.04") == 2
    assert "3 of 60 clips are unreadable" in capsys.readouterr().err

def test_recipes_follow_the_data_set_and_yield_to_the_command_line(monkeypatch):
    monkeypatch.setattr(xmkd, "find_layout", lambda root: str(root))
    args, _ = xmkd.parse_options(["--data", "activitynet", "--batch-size", "16"])
    assert (args.task, args.csc_offset, args.batch_size) == ("action_recognition", 0.2, 16)
    assert xmkd.parse_options(["--data", "audioset"])[0].task == "audio_tagging"
    demo, _ = xmkd.parse_options([])
    assert (demo.task, demo.epochs, demo.batch_size, demo.csc_offset) == ("video_retrieval", 200, 32, 0.07)
    assert demo.out == "runs/video_retrieval-demo-student-xmkd-s3"

WORKER = """
import torch, sys, xmkd
import torch.distributed as dist
dist.init_process_group("gloo")
rank, world = xmkd.process()
torch.manual_seed(0)
student = torch.nn.Linear(6, 6)
student.forward_once = student.forward
class Student(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 12)
        self.cls = torch.nn.Linear(6, 3)
    def forward(self, x):
        features = self.layer(x).relu().view(len(x), 2, 6)
        return xmkd.Features(features, features.mean(1), self.cls(features.mean(1)))
student, noise_filter = Student().double(), xmkd.ModalityNoiseFilter(3, 6).double()
optimizer = xmkd.make_optimizer(student, noise_filter, lr=0.01)
for step in range(3):
    g = torch.Generator().manual_seed(step)
    x, t = torch.rand(8, 6, generator=g).double(), torch.rand(8, 6, generator=g).double()
    y = torch.arange(8) % 3
    own = slice(rank * 8 // world, (rank + 1) * 8 // world)
    terms = xmkd.train_step(student, noise_filter, optimizer, x[own], t[own], y[own])
if rank == 0:
    torch.save([*student.state_dict().values(), *noise_filter.state_dict().values(), *terms.values()], sys.argv[1])
"""

def test_two_processes_train_as_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    results = []
    for count in "1", "2":
        out = tmp_path / f"{count}.pt"
        run_torchrun(count, tmp_path / "worker.py", out)
        results.append(torch.load(out))
    for one, two in zip(*results):
        close(one, two, atol=1e-6)         # Adam amplifies rounding where gradients are 0

def test_torchrun_trains_and_evaluates_every_clip_once(tmp_path, demo):
    run_torchrun("2", Path(xmkd.__file__), *map(str, SMALL), "--data", demo, "--method", "student,xmkd",
                 "--epochs", "1", "--out", tmp_path, "--cache", demo.parent / "cache")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["clips"] == {"train": 40, "eval": 20} and set(results["table"]) == {"teacher", "student", "xmkd"}

def test_every_option_is_used():
    source = Path(xmkd.__file__).read_text()
    actions = [action for action in xmkd.build_parser()._actions if action.dest != "help"]
    assert len(actions) == 42
    for action in actions:
        assert f"args.{action.dest}" in source and action.help
