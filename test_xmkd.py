"""Tests of xmkd.py, in the order of its sections; some need the folder XMKD_TESTDATA."""
import ast
import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest.mock import MagicMock

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import xmkd

torch.set_num_threads(1)
HERE = Path(xmkd.__file__).parent
TESTDATA = Path(os.environ.get("XMKD_TESTDATA", "/nowhere"))
PARITY = TESTDATA / "parity"
needs_testdata = pytest.mark.skipif(not TESTDATA.is_dir(), reason="XMKD_TESTDATA names no folder")

def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))

def close(ours, right, atol=1e-5):
    pair = [torch.as_tensor(value, dtype=torch.float64).detach() for value in (ours, right)]
    torch.testing.assert_close(*pair, atol=atol, rtol=0)

# A batch of four clips: embeddings p, evidence s^, teacher t, similarities and labels.
P = rand(4, 6) - 0.3
EVIDENCE = rand(4, 6, seed=1) - 0.3
TEACHER = rand(4, 6, seed=2)
SIMILARITY = rand(4, 4, seed=3) * 2 - 1
CLASSES = torch.tensor([0, 1, 1, 2])
TAGS = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0]])

# -------------------- 1. Method --------------------
def test_csc_of_two_clips_worked_by_hand():
    # cosines of p = (1, 0), (0, 1) with s^ = (1, 0), (.6, .8): [[1, .6], [0, .8]]
    # temperatures, where -1 counts as 0: [[.43, 0], [-1, .93]] + .07 = [[.5, .07], [.07, 1]]
    # logits: [[2, 8.571429], [0, .8]]; a clip's loss is log(1 + exp(other - own)), the softplus
    evidence = torch.tensor([[2.0, 0.0], [3.0, 4.0]])
    similarity = torch.tensor([[0.43, 0.0], [-1.0, 0.93]])
    loss = xmkd.csc_loss(torch.eye(2), evidence, similarity, torch.arange(2), offset=0.07)
    close(loss, F.softplus(torch.tensor([8.571429 - 2, 0 - 0.8])).mean())

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

def test_csc_depends_neither_on_order_nor_on_scale():
    loss = xmkd.csc_loss(P, EVIDENCE, SIMILARITY, CLASSES)
    order = torch.tensor([3, 1, 0, 2])
    similarity = SIMILARITY[order][:, order]
    close(xmkd.csc_loss(P[order], EVIDENCE[order], similarity, CLASSES[order]), loss)
    close(xmkd.csc_loss(7 * P, EVIDENCE / 9, SIMILARITY, CLASSES), loss)
    equal = torch.ones(4, 4)
    close(xmkd.csc_loss(equal, equal, equal, CLASSES), math.log(4))
    with pytest.raises(ValueError, match="detached"):
        xmkd.csc_loss(P, EVIDENCE, rand(4, 4).requires_grad_(), CLASSES)

def test_labels_overlap_by_equality_or_by_the_jaccard_index():
    close(xmkd.label_overlap(CLASSES)[1], [0, 1, 1, 0])
    # tags {0, 2}, {1}, {1, 2}, {0}: {1} and {1, 2} share one of two, {0, 2} and {1, 2} one of three
    close(xmkd.label_overlap(TAGS)[2], [1 / 3, 1 / 2, 1, 0])

def test_losses_of_the_filter_and_of_tags_worked_by_hand():
    close(xmkd.sparsity_loss(torch.tensor([[1.0, -2.0], [4.0, 0.0]])), (3 + 4) / 2)
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
    filter_loss += 1e-3 * xmkd.sparsity_loss(helper.gated_feature_composer[-1].weight)
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
    assert not any(map(torch.equal, student.parameters(), before))
    if helper is not None:
        for weight in helper.parameters():
            assert (weight.grad is None) == (method == "kd")            # its probe stays as it is

def test_the_filter_learns_at_a_fifth_of_the_students_rate():
    groups = xmkd.make_optimizer(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).param_groups
    for group, rate in zip(groups, [3e-4, 6e-5], strict=True):
        close([group["lr"], group["weight_decay"]], [rate, 5e-4], 1e-9)

# -------------------- 2. Compared methods --------------------
def test_soft_targets_worked_by_hand():
    # at temperature 4, (0, 4 log 3) becomes (1/4, 3/4) as classes and (1/2, 3/4) as tags
    teacher = torch.tensor([[0.0, 4 * math.log(3)]])
    divergence = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)            # from (1/2, 1/2)
    for labels in CLASSES[:1], TAGS[:1, :2]:
        close(xmkd.kd_loss(torch.zeros(1, 2), teacher, labels), 16 * divergence)

# -------------------- 3. Networks --------------------
def test_networks_return_map_embedding_and_logits():
    video = xmkd.VideoNet(7, width=8)(rand(2, 3, 16, 32, 48))
    assert [part.shape for part in video] == [(2, 12, 64), (2, 64), (2, 7)]     # 2 x 2 x 3
    close(video.pooled, video.map.mean(1))
    sound = xmkd.AudioNet(7, 8, dim=None)(rand(2, 101, 64))             # without fc1
    assert [part.shape for part in sound] == [(2, 24, 64), (2, 64), (2, 7)]     # 6 x 4
    profile = sound.map.unflatten(1, (6, 4)).mean(2)                    # (2, 6, 64): mean over mel
    close(sound.pooled, profile.amax(1) + profile.mean(1))

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

@pytest.fixture
def formula(monkeypatch):
    """Imports the module that makes weights and inputs from their names."""
    monkeypatch.syspath_prepend(PARITY)
    return importlib.import_module("formula_weights")

def fill(network, formula, salt, **more):
    keys = [(key, value.shape) for key, value in network.state_dict().items()]
    weights = formula.fill(keys, f"open/{salt}", **more)
    network.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    return network.eval()

@needs_testdata
def test_the_video_student_agrees_with_the_authors(formula):
    right = np.load(PARITY / "open/video.npz")
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
    right = np.load(PARITY / "open/trajectory.npz")
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
    right = np.load(PARITY / "open/panns.npz")
    sound = torch.from_numpy(formula.waveform("panns_wave", 2, 64000, 32000, "open"))
    close(xmkd.LogMel()(sound), right["logmel"], 1e-3)
    net = fill(xmkd.AudioNet(527, stages=stages), formula, name, front_bn="bn0")
    keys = json.loads((PARITY / "panns_keys.json").read_text())[name]["keys"]
    assert list(net.state_dict()) == [key for key, *_ in keys if "extractor" not in key]
    with torch.no_grad():
        out = net(torch.from_numpy(right["logmel"]))
    close(out.pooled, right[f"{name}_embedding"], 2e-5)
    close(out.logits.sigmoid(), right[f"{name}_clipwise_output"], 5e-6)

# -------------------- 4. Media --------------------
def write_sound(path, channels, rate=16000, codec="pcm_s16le"):
    """Writes sound (channels, samples), -1..1."""
    layout = {1: "mono", 3: "2.1"}[len(channels)]
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.float32(channels), "fltp", layout)
        frame.sample_rate = rate
        file.mux(stream.encode(frame) + stream.encode(None))
    return path

def write_video(path, count=40):
    """Writes pictures, 10 a second. Picture k is 16 + 5 k; its upper left quarter is black."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10, width=64, height=48, pix_fmt="yuv420p",
                                 bit_rate=2_000_000, gop_size=25)
        stream.codec_context.sample_aspect_ratio = 2        # pixels twice as wide as high
        for k in range(count):
            picture = np.full((48, 64, 3), 16 + 5 * k, np.uint8)
            picture[:24, :32] = 0
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts = k
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path

def shown(frames):
    levels = frames[:, :, -8:, -8:].float().mean((1, 2, 3))
    return ((levels - 16) / 5).round().int().tolist()

tone = lambda seconds: 0.6 * np.sin(0.1 * np.arange(seconds * 16000))

@pytest.mark.parametrize("rate, codec", [(8000, "pcm_u8"), (22050, "pcm_s16le"),
                                         (32000, "pcm_f64le"), (44100, "pcm_s32le")])
def test_sound_begins_at_its_sample_and_is_the_mean_of_the_channels(tmp_path, rate, codec):
    clicks = np.zeros((3, 4 * rate))
    clicks[0, 3 * rate] = 0.9           # at 3 s, which is 0.75 s = 24,000 samples behind 2.25 s
    sound = xmkd.decode_audio(write_sound(tmp_path / "a.wav", clicks, rate, codec), 2.25, 3.5)
    assert (len(sound), sound.argmax()) == (40000, 24000)
    assert sound.max() == pytest.approx(0.3 * min(1, 32000 / rate), abs=0.02)

@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_picture_k_is_the_one_shown_at_start_plus_k_over_fps(tmp_path, name):
    path = write_video(tmp_path / name)
    # Picture n is shown from n / 10 s on: at 1.53, 1.78, 2.03, 2.28 s these are 15, 17, 20, 22.
    # In MPEG-TS a seek to 0.53 s lands at the key picture of 2.5 s.
    assert shown(xmkd.decode_video(path, 1.53, 2.53, fps=4)) == [15, 17, 20, 22]
    assert shown(xmkd.decode_video(path, fps=10)) == list(range(40))
    assert xmkd.decode_video(path).shape == (16, 3, 48, 128)    # square pixels, not enlarged
    assert xmkd.decode_video(path, side=24).shape == (16, 3, 24, 64)
    assert shown(xmkd.decode_video(write_video(tmp_path / name, 3), fps=10)) == [0, 1, 2]

def test_a_held_picture_counts_and_a_tag_behind_the_sound_does_not(tmp_path):
    path = write_video(tmp_path / "a.avi")
    path.write_bytes(path.read_bytes().replace(b"idx1", 20 * b"00dc\0\0\0\0" + b"idx1"))
    assert shown(xmkd.decode_video(path, fps=10))[40:] == 20 * [39]
    path = write_sound(tmp_path / "a.mp3", tone(3)[None], codec="libmp3lame")
    path.write_bytes(path.read_bytes() + b"APETAGEX" + bytes(100_000))
    assert len(xmkd.decode_audio(path)) == pytest.approx(96000, rel=0.03)

@pytest.mark.parametrize("name", ["a.avi", "a.mkv"])
def test_a_file_that_is_shorter_than_its_header_says_is_refused(tmp_path, name):
    path = write_video(tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[:len(content) * 4 // 5])
    assert shown(xmkd.decode_video(path, 0.03, 1.03)) == [0, 2, 5, 7]
    with pytest.raises(xmkd.InputError, match=f"{name}: truncated"):
        xmkd.decode_video(path)

def test_what_holds_no_sound_is_refused_with_its_path(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "list").write_text("ffconcat version 1.0\nfile good.wav\n")
    write_sound(tmp_path / "good.wav", tone(2)[None])
    write_sound(tmp_path / "nan.wav", np.full((1, 9000), np.nan), codec="pcm_f32le")
    write_sound(tmp_path / "loud.wav", 32768 * tone(2)[None], codec="pcm_f32le")
    write_video(tmp_path / "silent.mp4")
    for name in "empty", "list", "nan.wav", "loud.wav", "silent.mp4", "none":
        with pytest.raises(xmkd.InputError, match=f"^{tmp_path}/{name}: "):
            xmkd.decode_audio(tmp_path / name)
    with pytest.raises(ValueError, match="start is 5 and end 2"):
        xmkd.decode_audio(tmp_path / "good.wav", 5, 2)

# -------------------- 5. Data sets --------------------
def put(root, names, text=""):
    """Writes files and makes the folders that they lie in; returns the path of the last."""
    for name in names.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, newline="")
    return str(root / name)

def audioset(root, train, split="balanced"):
    """Writes AudioSet's lists, with these training rows, and the file of one evaluation clip."""
    labels = 'index,mid,display_name\r\n0,/m/1,"One, first"\r\n1,/m/2,"Two"\r\n'
    put(root, "metadata/class_labels_indices.csv", labels)
    put(root, f"metadata/{split}_train_segments.csv", train)
    put(root, "metadata/eval_segments.csv", '# A\nbbbbbbbbbb0, 0.000, 10.000, "/m/1"\n')
    put(root, "eval/Ybbbbbbbbbb0.wav")

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
    audioset(tmp_path, f'\ufeff{ytid}, 30.000, 40.000, "/m/1,/m/2"\r\n\r\n')
    path = put(tmp_path, name.format(ytid))
    clips, classes = xmkd.read_audioset(tmp_path)
    assert classes == ["One, first", "Two"]
    assert not xmkd.tells_start("_2", 1.5)              # may be an index
    video = path if name.endswith((".mp4", ".mkv")) else None
    assert clips[0] == (ytid, (0, 1), "train", path, video, 30, 40, cut)

def test_missing_and_repeated_clips_are_reported_and_the_share_found_is_told(tmp_path):
    rows = ['"# YTID",,,\n']                            # as a spreadsheet saves a list
    rows += [f'aaaaaaaaaa{k},0,10,"""/m/1,/m/2""",,\n' for k in (0, 1, 0)]
    audioset(tmp_path, "".join(rows), split="unbalanced")
    put(tmp_path, """AAAAAAAAAA1.wav .a/aaaaaaaaaa1.wav A/aaaaaaaaaa0.wav B/aaaaaaaaaa0.wav
        metadata/._eval_segments.csv ._aaaaaaaaaa1.wav""")        # ._*: of a Mac's archive
    os.symlink(tmp_path, tmp_path / "loop")
    skipped = []
    layout, clips, _ = xmkd.read_data(tmp_path, split="unbalanced", skipped=skipped)
    assert (layout, files_of(clips[0])) == ("audioset", ["aaaaaaaaaa0.wav", None])
    copy = str(tmp_path / "B/aaaaaaaaaa0.wav")
    assert skipped == [(copy, "not used: other files of this clip come first"),
                       ("aaaaaaaaaa1", "missing: no file is named after this training clip"),
                       ("aaaaaaaaaa0", "listed twice: the first row counts")]
    assert xmkd.coverage(clips, skipped).startswith("found 1 of 2 training clips (50.0%)")

@pytest.mark.parametrize("content, reason", [
    ("aaaaaaaaaa0, 0, 10, /m/1", "train and eval are needed, .*'eval'.*; found 0 of 1 training"),
    ("aaaaaaaaaa0, 10, nan, /m/1", "balanced_train_segments.csv:1: .*0 <= start < end"),
    ("# A\naaaaaaaaaa0, 0, 10, /m/9", "balanced_train_segments.csv:2: .* known labels.*/m/9"),
    ("#NAME?, 0, 10, /m/1", "balanced_train_segments.csv:1: '#NAME.' is no id of 11"),
    ("notes", "none of .*clips.csv.*classInd.txt.*annotation.json"),
    ("eval_segments.csv", "class_labels_indices.csv is missing"),
    ("train/dog/0.wav test/dog/1.wav", "no val/; rename .* test/"),
    ("a/train/dog/0.wav b/train/dog/0.wav", "a/train and .*b/train are both there")])
def test_what_cannot_be_read_says_why(tmp_path, content, reason):
    write = audioset if ", " in content else put        # AudioSet's training list, or empty files
    write(tmp_path, content)
    with pytest.raises(xmkd.InputError, match=reason):
        xmkd.read_data(tmp_path)

def test_what_has_no_media_files_says_why(tmp_path):
    audioset(tmp_path, "aaaaaaaaaa0, 0, 10, /m/1\n")
    (tmp_path / "eval/Ybbbbbbbbbb0.wav").rename(tmp_path / "other.wav")
    with pytest.raises(xmkd.InputError, match="any of 2 listed .*a0.*bbbbbbbbbb0.*other.wav"):
        xmkd.read_data(tmp_path)

@pytest.mark.parametrize("row, reason", [
    ("a,test,dog", ":3: expected an id, .*'test'"), ("a,train,dog,,, bat", ":3: .* more cells"),
    ("a,train,dog,-5,1", ":3: .*0 <= start < end"), ("a,train,dog,2,1", ":3: .*0 <= start < end"),
    ("a,train,dog,nan,", ":3: .*0 <= start < end"), ("a,train,b\udce4r", ": .*save it in UTF-8")])
def test_a_row_of_clips_csv_that_cannot_be_used_is_named(tmp_path, row, reason):
    text = f"id,split,labels,start,end\n\n{row}\n"
    (tmp_path / "clips.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(xmkd.InputError, match=f"clips.csv{reason}"):
        xmkd.read_list(tmp_path)

def test_ucf101_is_read_whatever_its_case_and_line_ends_and_only_where_it_has_sound(tmp_path):
    put(tmp_path, """UCF-101/Typing/v_Typing_g01_c02.avi UCF-101/Biking/v_Biking_g08_c01.avi
        UCF-101/HandstandPushups/v_HandstandPushups_g08_c01.avi""")
    put(tmp_path, "lists/classInd.txt", "37 HandstandPushups\r\n95 Typing\r\n11 Biking\r\n")
    put(tmp_path, "lists/trainlist02.txt", "HandstandPushups/v_HandStandPushups_g08_c01.avi 37\r\n"
                                           "Biking/v_Biking_g08_c01.avi 11\r\n")
    put(tmp_path, "lists/testlist02.txt", "Typing/v_Typing_g01_c01.avi\r\n"
                                          "Typing/v_Typing_g01_c02.avi 95\r\n")
    skipped = []
    layout, clips, classes = xmkd.read_data(tmp_path, fold=2, skipped=skipped)
    assert (layout, classes) == ("ucf101", ["HandstandPushups", "Typing"])
    assert [clip[:3] for clip in clips] == [("v_HandStandPushups_g08_c01", (0,), "train"),
                                            ("v_Typing_g01_c02", (1,), "eval")]
    assert [name for name, _ in skipped] == ["v_Typing_g01_c01"]

def test_activitynet_segments_are_clips_cut_out_or_parts_of_the_whole_video(tmp_path):
    notes = [{"label": "Surf", "segment": [1.5, 9]}, {"label": "Archery", "segment": [20, 31]}]
    database = {name: {"subset": "training", "annotations": notes} for name in ("aaaaaaaaaa0", "x")}
    database["-bbb"] = {"subset": "validation", "annotations": notes[:1]}
    database["c"] = {"subset": "testing", "annotations": []}
    database["d"] = {"subset": "training", "annotations": [{"label": "Surf", "segment": [9, 1.5]}]}
    content = {"labels": ["Surf", "Archery"], "database": database}     # in the release's own order
    put(tmp_path, "annotation.json", json.dumps(content))
    put(tmp_path, "v_aaaaaaaaaa0.mkv -bbb.mp4 v_x_1.mp4 v_c.mp4 v_x.hdf5")
    skipped = []
    layout, clips, classes = xmkd.read_data(tmp_path, skipped=skipped)
    assert (layout, classes) == ("activitynet", ["Surf", "Archery"])
    assert [(clip.id, clip.labels, files_of(clip)[1], *clip[5:]) for clip in clips] == [
        ("v_aaaaaaaaaa0_0", (0,), "v_aaaaaaaaaa0.mkv", 1.5, 9, False),
        ("v_aaaaaaaaaa0_1", (1,), "v_aaaaaaaaaa0.mkv", 20, 31, False),
        ("v_x_1", (1,), "v_x_1.mp4", 20, 31, True),
        ("v_-bbb_0", (0,), "-bbb.mp4", 1.5, 9, False)]
    assert [name for name, _ in skipped] == ["v_d_0", "v_x_0"]

def test_files_of_one_name_are_one_clip_and_those_that_it_does_not_need_are_listed(tmp_path):
    put(tmp_path, "train/cat/pair.mp4 train/cat/pair.wav train/stray.mp4 val/dog/x/1.mkv "
                  "val/dog/b.xyz val/dog/c.m4a")
    for name in "a.mov", "a.avi", "b.avi", "b.temp.avi":
        picture = np.zeros((32, 32, 3), np.uint8)
        xmkd.write_media(tmp_path / "val/dog" / name, np.zeros(32000, np.int16), picture)
    skipped = []
    layout, clips, classes = xmkd.read_data(tmp_path, skipped=skipped)
    assert (layout, classes) == ("folder", ["cat", "dog"])
    assert {clip.id: files_of(clip) for clip in clips} == {
        "train/cat/pair": ["pair.wav", "pair.mp4"], "val/dog/x/1": ["1.mkv", "1.mkv"],
        "val/dog/a": ["a.avi", "a.avi"], "val/dog/b": ["b.avi", "b.avi"],
        "val/dog/c": ["c.m4a", None]}
    assert [clip.split for clip in clips] == ["train"] + 4 * ["eval"]
    assert [Path(path).name for path, _ in skipped] == ["stray.mp4", "b.xyz", "a.mov", "b.temp.avi"]
    assert xmkd.lone_labels(clips, classes) == ["cat (training)", "dog (evaluation)"]

def test_any_list_is_read_as_clips_csv(tmp_path):
    put(tmp_path, "media/2.mp4 a/1.webm b/1.webm cafe\u0301.mp4")
    put(tmp_path, "clips.csv", '\ufeffid,split,labels,start,end\r\na/1,train,"dog; loud, cat",,\r\n'
                               "b/1,eval,dog,30,40\r\n2,eval,dog,5,\r\n"
                               "caf\u00e9,eval,dog,0,2.5\r\ncaf\u00e9,eval,dog,2.5,\r\n")
    layout, clips, classes = xmkd.read_data(tmp_path)
    assert (layout, classes) == ("list", ["dog", "loud, cat"])
    assert [(*clip[:3], files_of(clip)[1], *clip[5:]) for clip in clips] == [
        ("a/1", (0, 1), "train", "1.webm", 0, None, False),
        ("b/1", (0,), "eval", "1.webm", 30, 40, False),
        ("2", (0,), "eval", "2.mp4", 5, None, False),
        ("caf\u00e9@0-2.5", (0,), "eval", "cafe\u0301.mp4", 0, 2.5, False),
        ("caf\u00e9@2.5", (0,), "eval", "cafe\u0301.mp4", 2.5, None, False)]

# -------------------- 6. Demo --------------------
def draw_class(own, rng):
    """Draws class `own` of 51, a shape, filling and turn by 0, 30 or 60 degrees, over others."""
    kinds = [(event, turn) for turn in range(3) for event in range(20) if turn == 0 or event > 1]
    ground, contrast = rng.uniform(60, 196, 3), rng.uniform(0.35, 0.8)
    picture = rng.normal(ground, 8, (48, 48, 3))
    for k in [*rng.integers(51, size=rng.integers(3)), own]:
        event, turn = kinds[k]
        radius, angle = rng.uniform(10, 14), turn * math.pi / 6 + rng.uniform(-0.1, 0.1)
        down, right = (np.mgrid[:48, :48] - rng.uniform(radius, 48 - radius, (2, 1, 1))) / radius
        turned = (right + 1j * down) * np.exp(-1j * angle)
        color = ground + rng.choice([-128, 128], 3) * rng.uniform(0.4, 1, 3)
        inside = xmkd.demo_shape(event, turned.real, turned.imag)
        share = contrast if k == own else contrast / 2
        picture[inside] += share * (color - picture[inside])
    return picture.clip(0, 255).astype(np.uint8)

def write_ucf51(root, seed=3):
    """Writes a picture for each clip of UCF51's split 1, whose lists lie in `root`."""
    rng, names = np.random.default_rng(seed), sorted(xmkd.UCF51)
    for part in "trainlist01.txt", "testlist01.txt":
        for line in xmkd.find_list(root, part).read_text().split("\n"):
            path = Path(root, "UCF-101", line.split(" ")[0])
            if path.parent.name.lower() in names:
                picture = draw_class(names.index(path.parent.name.lower()), rng)
                path.parent.mkdir(parents=True, exist_ok=True)
                xmkd.write_media(path, np.zeros(320, np.int16), picture)

def test_the_demos_teacher_is_noisy_and_wrong_as_often_as_asked(monkeypatch):
    monkeypatch.setattr(xmkd, "demo_sound", lambda events, rng, length: events)
    monkeypatch.setattr(xmkd, "demo_picture", lambda events, rng: events)
    rng, noisy, wrong = np.random.default_rng(0), 0, 0
    for _ in range(400):
        labelled, sound, picture = xmkd.demo_clip(3, "video", False, 0.2, 0.4, rng)
        assert [max(picture, key=picture.get)] == labelled == [3]
        noisy += -1 in sound
        wrong += 3 not in sound
    close([noisy / 400, wrong / 400], [0.2, 0.4], 0.06)

# -------------------- 7. Cache and views --------------------
@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Returns a small data set: 40 training and 20 evaluation clips of 20 classes."""
    root = tmp_path_factory.mktemp("data") / "demo"
    xmkd.write_demo(root, "video", False, 0.3, 0.2, seed=1, train=40, evaluation=20)
    return root

def decode(path, cache, views):
    """Returns the clip of a file and its stream's place in the cache."""
    clip = xmkd.Clip("a", (0,), "train", str(path), str(path), cut=True)
    (file,), _ = xmkd.decode_clip(clip, [views], cache)
    return clip, Path(file)

@needs_testdata
def test_windows_are_the_authors():
    known = json.loads((PARITY / "temporal_sampling.json").read_text())
    for n in known:
        if n.isdecimal():
            assert xmkd.even_windows(int(n)) == known[n]["TemporalEvenCrop(16,3)"]
            assert xmkd.sliding_windows(int(n)) == known[n]["SlidingWindow(16,16)"]

def test_a_clip_is_decoded_once_and_again_when_its_file_changes(tmp_path, demo):
    path = shutil.copy(demo / "0000.avi", tmp_path)
    views = xmkd.Views("video", fps=1.0, side=40)
    _, file = decode(path, tmp_path, views)
    content, written = file.read_bytes(), file.stat().st_mtime_ns
    assert decode(path, tmp_path, views)[1] == file
    assert file.stat().st_mtime_ns == written
    for damaged in b"", content[:-1], 900 * b"x":
        file.write_bytes(damaged)
        decode(path, tmp_path, views)
        assert file.read_bytes() == content
    with pytest.raises(xmkd.InputError, match="a.pt: a picture in it is damaged; delete it"):
        xmkd.decode_jpegs([torch.zeros(9, dtype=torch.uint8)], "a.pt")      # in a whole file
    assert decode(path, tmp_path, views._replace(side=32))[1] != file
    os.utime(path, (1, 1))
    assert decode(path, tmp_path, views)[1] != file

@pytest.mark.parametrize("owner, error", [("torch.save", OSError(28, "No space left on device")),
                                          ("xmkd.to_mono", MemoryError("Unable to allocate"))])
def test_a_fault_of_the_machine_is_not_a_clips(tmp_path, demo, monkeypatch, owner, error):
    monkeypatch.setattr(owner, MagicMock(side_effect=error))
    with pytest.raises(xmkd.InputError, match=error.args[-1]):
        decode(demo / "0000.avi", tmp_path, xmkd.Views("audio"))

def read_windows(path, cache, kind, mode, epoch=1, seed=3, strong=False):
    """Returns the windows of a clip, which is the last of four."""
    views = xmkd.Views(kind, 2, 4.0, size=32, seconds=0.6, side=40, strong=strong)
    clip, file = decode(path, cache, views)
    data = xmkd.Data(4 * [clip], ["dog"], False, [2, 3], [], views, 4 * [file])
    dataset = xmkd.ClipViews(data, data.train, mode, seed)
    dataset.epoch.fill_(epoch)
    return dataset[1][1]

@pytest.mark.parametrize("kind", ["video", "audio"])
def test_training_windows_follow_from_seed_and_epoch_alone(tmp_path, demo, kind):
    given = demo / "0003.avi", tmp_path, kind, "train"
    first = read_windows(*given)
    torch.rand(5)                                       # the state of torch's generator has no say
    assert torch.equal(read_windows(*given), first)
    assert not torch.equal(read_windows(*given, epoch=2), first)
    assert not torch.equal(read_windows(*given, seed=4), first)

def test_evaluation_windows_follow_one_another(tmp_path):
    path = write_video(tmp_path / "a.mkv")              # 16 frames, that is 8 windows of two
    windows = read_windows(path, tmp_path, "video", "test")
    assert windows.shape == (8, 2, 3, 32, 32)
    assert shown(windows.flatten(0, 1)) == shown(xmkd.decode_video(path))
    # one second of sound in windows of 0.6 s: the second begins at 0.4 s, so that both are full
    sound = read_windows(write_sound(tmp_path / "a.wav", tone(1)[None]), tmp_path, "audio", "test")
    assert sound.shape == (2, 19200)
    assert torch.equal(sound[1, :6400], sound[0, 12800:])

def test_strong_windows_are_grey_and_of_full_contrast(tmp_path, demo):
    windows = read_windows(demo / "0003.avi", tmp_path, "video", "test", strong=True)
    assert torch.equal(windows[:, :, 0], windows[:, :, 2])
    assert windows.max() > 200

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
    assert xmkd.score_classes(scores, torch.tensor([2, 0]), ["a", "b", "c"]) == {"c": 0, "a": 1}
    # tag 0: the hit comes first, AP 1, AUC 1; tag 1: hits at 2 and 3 of 4, AP (1/2 + 2/3) / 2, AUC
    # 1/2; the normal distribution reaches the mean AUC of 0.75 at 0.6745, and d' is sqrt(2) of it
    columns = torch.tensor([[0.4, 0.9], [0.3, 0.5], [0.2, 0.2], [0.1, 0.1]])
    tags = xmkd.score(columns, torch.tensor([[1, 0], [0, 1], [0, 1], [0, 0]]))
    assert list(tags) == ["mAP", "AUC", "d_prime"]
    close(list(tags.values()), [19 / 24, 0.75, 0.9539], 1e-4)

def test_retrieval_worked_by_hand():
    # the first query ranks a, c, b: hits at 1 and 3, precisions 1 and 2/3; the second has no hit
    gallery = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    queries = torch.tensor([[3.0, 1.0], [1.0, 0.0]])
    found = xmkd.retrieval_metrics(queries, gallery, [0, 5], [0, 0, 1], ks=(1, 50), topk=2)
    assert list(found) == ["R@1", "R@50", "mAP", "mAP_released"]
    close(list(found.values()), [0.5, 0.5, 5 / 12, 1])
    # equal similarities: the miss comes first, hits at 2 and 3, precisions 1/2 and 2/3
    found = xmkd.retrieval_metrics(torch.ones(1, 2), torch.ones(3, 2), [1], [1, 0, 1], ks=(1, 2))
    close(list(found.values()), [0, 1, 7 / 12, 7 / 12])

@pytest.mark.parametrize("metric, labels", [
    (xmkd.mean_average_precision, TAGS[:, :2]), (xmkd.mean_auc, TAGS[:, :2]),
    (xmkd.topk_accuracy, CLASSES), (xmkd.score, CLASSES),
    (lambda odd, labels: xmkd.retrieval_metrics(odd[:0], odd, labels[:0], labels), CLASSES),
    (lambda odd, labels: xmkd.retrieval_metrics(odd.nan_to_num(), odd, labels, labels), CLASSES)])
def test_what_is_not_a_number_or_not_there_has_no_rank(metric, labels):
    odd = torch.tensor([[math.nan, 0.4], [0.8, 0.2], [0.9, 0.1], [0.7, 0.3]])
    with pytest.raises(ValueError, match="NaN|0 queries"):
        metric(odd, labels)

@needs_testdata
@pytest.mark.parametrize("kind", ["", "weak_"])
def test_retrieval_agrees_with_the_authors(kind):
    right = np.load(PARITY / "open/retrieval.npz")
    names = ("val_features", "train_features", "val_labels", "train_labels")
    data = [right[kind + name] for name in names]
    for k, expected in zip(right[kind + "hit_k"], right[kind + "hit_rate"]):
        close(xmkd.retrieval_metrics(*data, ks=[k])[f"R@{k}"], expected, 1e-9)
    for k, expected in zip(right[kind + "map_k"], right[kind + "map"]):
        close(xmkd.retrieval_metrics(*data, topk=k)["mAP_released"], expected, 1e-9)

# -------------------- 9. Checkpoints --------------------
def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    xmkd.save(tmp_path / "a.pt", {"x": 1})
    monkeypatch.setattr(os, "replace", MagicMock(side_effect=OSError("disk full")))
    with pytest.raises(xmkd.InputError, match="a.pt cannot be written.*disk full"):
        xmkd.save(tmp_path / "a.pt", {"x": 2})
    assert torch.load(tmp_path / "a.pt") == {"x": 1}
    assert os.listdir(tmp_path) == ["a.pt"]

def write_authors_file(path, prefix):
    """Writes a checkpoint as the authors' code does, with a pickled scheduler and optimizer."""
    student, noise_filter = xmkd.VideoNet(5, width=2), xmkd.ModalityNoiseFilter(5, 16)
    optimizer = torch.optim.Adam(student.parameters(), weight_decay=5e-4)
    sum(weight.sum() for weight in student.parameters()).backward()
    optimizer.step()
    content = {"epoch": 7, "optimizer": optimizer.state_dict(),
               "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [150])}
    for key, network in ("state_dict", student), ("audio_state_dict", noise_filter):
        content[key] = {prefix + name: value for name, value in network.state_dict().items()}
    torch.save(content, path)
    return student, noise_filter

@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_the_authors_checkpoints_load(tmp_path, prefix):
    student, noise_filter = write_authors_file(tmp_path / "a.pth", prefix)
    saved = xmkd.load_checkpoint(tmp_path / "a.pth")
    inputs = rand(2, 3, 2, 32, 32)
    found = xmkd.restore(saved, "cpu").eval()(inputs).logits
    assert torch.equal(found, student.eval()(inputs).logits)
    noise_filter.load_state_dict(saved["filter"])
    assert (saved["epoch"], saved["method"], saved["classes"]) == (7, "xmkd", None)
    saved["student"]["cls.bias"][0] = math.nan
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(xmkd.InputError, match="cls.bias holds numbers that are infinite or NaN"):
        xmkd.load_checkpoint(tmp_path / "a.pt")

@pytest.mark.parametrize("stages, dim", [(4, 512), (6, 512), (6, None)])
def test_panns_checkpoints_load(tmp_path, stages, dim):
    state = xmkd.AudioNet(527, 2, stages, dim).state_dict()
    state["logmel_extractor.melW"] = torch.zeros(513, 64)
    sampler = np.random.RandomState(1).get_state()
    torch.save({"iteration": 1, "model": state, "sampler": sampler}, tmp_path / "Cnn.pth")
    saved = xmkd.load_checkpoint(tmp_path / "Cnn.pth")
    assert saved["network"] == {"kind": "audio", "num_classes": 527, "dim": dim, "width": 2,
                                "stages": stages}
    xmkd.restore(saved, "cpu")
    state["fc_audioset.bias"] = torch.zeros(9)
    torch.save({"model": state}, tmp_path / "odd.pth")
    (tmp_path / "text.pth").write_text("id,split,labels")
    for name, reason in ("odd", "size mismatch for fc_audioset.bias"), ("text", "has not written"):
        with pytest.raises(xmkd.InputError, match=f"{name}.pth .*{reason}"):
            xmkd.load_checkpoint(tmp_path / f"{name}.pth")

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

# -------------------- 10. Training and evaluation --------------------
SMALL = """--width 2 --frames 1 --fps 1 --size 32 --frame-side 40 --seconds 1 --epochs 1
    --teacher-epochs 1 --batch-size 8 --eval-every 1 --workers 0 --teacher scratch""".split()

def command(data, out, *options):
    """Returns the options of a small run; it takes about a second on `demo`."""
    folders = ["--data", data, "--out", out, "--cache", data.parent / "cache"]
    return SMALL + [str(option) for option in folders + list(options)]

def results_in(out):
    return json.loads((out / "results.json").read_text())

@pytest.mark.parametrize("task, metric", [
    ("audio_tagging", "mAP"), ("action_recognition", "top1"), ("video_retrieval", "R@1")])
def test_each_task_trains_on_files_and_leaves_what_it_promises(tmp_path, demo, task, metric):
    options = ["--task", task, "--epochs", 4, "--per-class", 1]
    assert xmkd.main(command(demo, tmp_path, *options)) == 0
    names = "best.pt config.json last.pt log.jsonl results.json skipped.csv teacher teacher.pt"
    assert sorted(os.listdir(tmp_path)) == names.split()
    results = results_in(tmp_path)
    assert (list(results["metrics"])[0], results["clips"]) == (metric, {"train": 20, "eval": 20})
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    close([row["lr"] for row in rows], [3e-4, 3e-4, 3e-4, 3e-5], 1e-9)
    for name in "cosine", "gate", "entropy":
        assert 0 < rows[3][name] < 1.001
    first = "mAP" if task == "audio_tagging" else "top1"
    assert torch.load(tmp_path / "best.pt")["epoch"] == results["epoch"]
    assert rows[results["epoch"] - 1][first] == max(row[first] for row in rows)

def test_all_methods_share_a_teacher_and_stand_in_one_table(tmp_path, demo, capsys):
    assert xmkd.main(command(demo, tmp_path, "--method", "all", "--seeds", 2)) == 0
    table = results_in(tmp_path)["table"]
    assert set(table) == {"teacher", *xmkd.METHODS}
    # the table shows the mean of the two runs and their standard deviation, |a - b| / sqrt(2)
    a, b = [run["top1"] for run in table["kd"]]
    mean, deviation = (a + b) / 2, abs(a - b) / math.sqrt(2)
    printed = capsys.readouterr().out
    assert re.search(f"kd .* {mean:.3f} ± {deviation:.3f} ", printed)
    assert re.search("a step of 8 clips takes .* training about .* in all", printed)
    assert results_in(tmp_path)["metrics"]["kd"]["top1"] == pytest.approx(mean)

def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, demo, monkeypatch):
    one = command(demo, tmp_path / "one", "--epochs", 3, "--task", "audio_tagging")
    two = command(demo, tmp_path / "two", "--epochs", 3, "--task", "audio_tagging", "--resume")
    monkeypatch.chdir(tmp_path)
    os.mkdir("scratch")                                 # no folder is meant by --teacher scratch
    assert xmkd.main(one) == 0
    train_epoch, calls = xmkd.train_epoch, []

    def stop(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:                             # in the second epoch of the student
            raise KeyboardInterrupt
        return train_epoch(*arguments, **options)

    monkeypatch.setattr(xmkd, "train_epoch", stop)
    assert xmkd.main(two) == 130
    assert xmkd.main(two + ["--workers", "1"]) == 0
    weights = torch.load(tmp_path / "two" / "last.pt")["student"]
    for name, value in torch.load(tmp_path / "one" / "last.pt")["student"].items():
        assert torch.equal(value, weights[name])
    assert results_in(tmp_path / "one")["metrics"] == results_in(tmp_path / "two")["metrics"]

@pytest.fixture(scope="session")
def trained(demo):
    """Returns the folder of a small run of the method xmkd."""
    out = demo.parent / "run"
    assert xmkd.main(command(demo, out)) == 0
    return out

def test_what_other_settings_have_made_is_refused_by_name(tmp_path, trained, demo, capsys):
    stopped = tmp_path / "stopped"                      # before the first last.pt
    stopped.mkdir()
    shutil.copy(trained / "teacher.pt", stopped)
    new = [tmp_path / "new", "--teacher", trained / "teacher.pt"]
    for out, change, name in [
            ([trained, "--resume"], "--lr=1e-4", "--resume: lr"),
            ([trained, "--resume"], "--seed=4", "--resume: seed"),
            ([trained, "--resume"], "--method=csc", "--resume: method"),
            ([stopped, "--resume"], "--teacher-epochs=2", "--resume: teacher_epochs"),
            ([stopped, "--resume"], "--seconds=0.8", "--resume: seconds"),
            (new, "--per-class=1", "--teacher: per_class"),
            (new, "--task=audio_tagging", "--teacher: task")]:
        assert xmkd.main(command(demo, *out, change)) == 2
        assert f"error: {name} was" in capsys.readouterr().err
    assert xmkd.main(command(demo, trained, "--resume")) == 0

def test_what_a_run_has_written_is_never_lost(tmp_path, demo, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = command(demo, "runs", "--method", "student")
    options = [word for word in options if word not in ("--out", "runs")]
    run = Path("runs/action_recognition-demo-student-s3")
    for name, more in ("", []), ("-2", []), ("-f2", ["--fold", "2"]), ("-3", ["--width", "3"]):
        assert xmkd.main(options + more) == 0
        assert (run.parent / f"{run.name}{name}/results.json").exists()
    assert f"this run goes to {run}-3; others are kept\n" in capsys.readouterr().out
    assert xmkd.main(options + ["--width", "3", "--resume"]) == 0       # the last of the three
    assert capsys.readouterr().out.startswith(f"continuing after epoch 1 of 1 in {run}-3\n")
    (run / "results.json").unlink()                     # as if the run had been interrupted
    for more in [], ["--seeds", "2", "--resume"], ["--checkpoint", f"{run}/last.pt", "--resume"]:
        assert xmkd.main(options + ["--out", str(run)] + more) == 2
        assert re.fullmatch("error: .*holds a run.*--resume.*--out\n", capsys.readouterr().err)
    assert xmkd.main(options + ["--out", "new", "--resume"]) == 0
    assert capsys.readouterr().out.startswith("nothing to resume in new; starting\n")

def test_a_loss_that_is_not_finite_names_step_and_clips(tmp_path, demo, monkeypatch, capsys):
    monkeypatch.setattr(xmkd, "train_step", lambda *_, **more: {"cls": torch.tensor(math.nan)})
    assert xmkd.main(command(demo, tmp_path, "--method", "student")) == 2
    assert re.search(r"step 1 of epoch 1.*clips are 00\d\d, 00", capsys.readouterr().err)

# In float64, without the student's batch norm, since each process on a CPU has its own statistics,
# and with plain gradient descent, since Adam does not see by how much a gradient is too large.
EXACT = """import torch, xmkd
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
torch.nn.BatchNorm3d = lambda width: torch.nn.Identity()
torch.optim.Adam = lambda groups, weight_decay: torch.optim.SGD(groups)
raise SystemExit(xmkd.main())"""

def test_two_processes_of_torchrun_train_as_one(tmp_path, trained, demo, monkeypatch):
    script = put(tmp_path, "exact.py", EXACT)
    teacher = torch.load(trained / "teacher.pt")
    teacher["embeddings"] = teacher["embeddings"].double()
    torch.save(teacher, tmp_path / "teacher.pt")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    for count in "1", "2":
        out = tmp_path / count
        options = command(demo, out, "--teacher", tmp_path / "teacher.pt", "--lr", 0.01)
        subprocess.run(launch + [count, script] + options, check=True)
    one, two = [torch.load(tmp_path / count / "last.pt") for count in "12"]
    for part in "student", "filter":
        for name, value in one[part].items():
            close(two[part][name], value)
    assert results_in(tmp_path / "1")["metrics"] == results_in(tmp_path / "2")["metrics"]

# -------------------- 11. Teacher --------------------
def test_embeddings_of_any_width_come_from_a_folder(tmp_path, demo):
    clips, _ = xmkd.read_list(demo)
    for clip in clips[2:]:
        np.save(tmp_path / f"{clip.id}.npy", np.eye(23)[clip.labels[0]])
    out = tmp_path / "out"
    assert xmkd.main(command(demo, out, "--teacher", tmp_path)) == 0
    assert torch.load(out / "teacher.pt")["embeddings"].shape == (58, 23)
    assert results_in(out)["teacher"]["metrics"]["top1"] == 1       # a probe finds the classes
    assert (out / "skipped.csv").read_text().count("no embedding") == 2

# -------------------- 12. Prediction on files --------------------
def test_predict_prints_classes_or_the_nearest_clips_and_names_bad_files(
        trained, demo, capsys, monkeypatch):
    ask = ["--checkpoint", str(trained / "last.pt"), "--workers", "0", "--predict"]
    good, bad = str(demo / "0003.avi"), trained / "bad.mp4"
    bad.write_bytes(b"<html>")
    assert xmkd.main(ask + [good, str(bad)]) == 2
    printed, error = capsys.readouterr()
    lines = printed.splitlines()
    assert lines[0] == good and f"\n{bad}\n  error: " in printed
    assert error == "error: 1 of 2 files could not be used\n"
    assert xmkd.main(ask + [good, "--gallery", str(trained)]) == 2      # it holds bad.mp4 alone
    assert "no clip can be used" in capsys.readouterr().err
    assert xmkd.main(ask + [good, "--gallery", str(demo)]) == 0
    nearest = capsys.readouterr().out.splitlines()[1:]
    scores = [float(line.split()[0]) for line in nearest]
    assert scores == sorted(scores, reverse=True)
    assert good not in "".join(nearest)                 # a file is not its own neighbour
    monkeypatch.chdir(trained)
    name = shutil.copy(good, lines[1].split()[1])       # a file that is called like a class
    assert xmkd.main(ask + [name]) == 0
    assert capsys.readouterr().out.splitlines() == [name, *lines[1:6]]

# -------------------- 13. Arguments and main --------------------
def test_a_checkpoint_scores_like_its_run_and_refuses_other_data(tmp_path, trained, demo, capsys):
    options = ["--checkpoint", str(trained / "last.pt"), "--workers", "0", "--out", str(tmp_path)]
    assert xmkd.main(options) == 0                      # with the data and views of its run
    assert results_in(tmp_path)["metrics"] == pytest.approx(results_in(trained)["metrics"])
    write_authors_file(tmp_path / "a.pth", "module.")
    assert xmkd.main(command(demo, tmp_path / "b", "--checkpoint", tmp_path / "a.pth")) == 2
    assert "has 5 classes" in capsys.readouterr().err

@pytest.mark.parametrize("options, message", [
    ("--data nowhere", "nowhere: there is no"), ("--lr nan", "nan is not a number from 0 to 10"),
    ("--methods csc", "unrecognized arguments"), ("--method csc,csc", "each once"),
    ("--device gpu", "gpu: choose cpu, cuda"),
    ("--device cuda:99", "cuda:99 cannot be used"), ("--predict a.mp4", "needs --checkpoint"),
    ("--checkpoint a.pt", "a.pt .*usable checkpoint"), ("--teacher nowhere", "nowhere is not auto"),
    ("--amp --device cpu", "--amp needs a GPU"), ("", "RANK or WORLD_SIZE in the environment")])
def test_bad_options_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    if options == "":
        monkeypatch.setenv("RANK", "1")                 # without the rest that torchrun sets
    assert xmkd.main(options.split()) == 2
    assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)
    assert os.listdir(tmp_path) == []                   # before anything is written

def test_unreadable_clips_are_skipped_with_a_reason_up_to_a_share(tmp_path, demo, capsys):
    folder, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(demo, folder)
    for name in "0000.avi", "0001.avi", "0050.avi":
        (folder / name).write_bytes(b"no video")
    assert xmkd.main(command(folder, out, "--method", "student")) == 0
    rows = (out / "skipped.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["id or path", "0000", "0001", "0050"]
    assert xmkd.main(command(folder, out / "b", "--method", "student", "--max-skipped", 0.04)) == 2
    assert "3 of 60 clips are unreadable" in capsys.readouterr().err

def test_a_missing_modality_is_refused_at_once_with_its_remedy(tmp_path, capsys):
    for name in "train/a/1.wav", "train/b/2.wav", "val/a/3.wav", "val/b/4.wav":
        write_sound(Path(put(tmp_path, f"data/{name}")), tone(1)[None])
    assert xmkd.main(command(tmp_path / "data", tmp_path, "--task", "audio_tagging")) == 2
    assert re.search("but all 2 clips have only sound; .*--method student", capsys.readouterr().err)
    assert not (tmp_path / "cache").exists()            # nothing has been decoded

# -------------------- The file itself --------------------
SOURCE = Path(xmkd.__file__).read_text()
NODES = ast.parse(SOURCE).body
CODE = {n for n, line in enumerate(SOURCE.splitlines(), 1) if not re.match(r"\s*(#|$)", line)}
for node in ast.walk(ast.parse(SOURCE)):                # takes the docstrings' lines away
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        CODE -= set(range(node.lineno, node.end_lineno + 1))
BANNERS = [i for i, line in enumerate(SOURCE.splitlines()) if line.startswith("# -----")]
IMPORTS = [node for node in NODES if isinstance(node, (ast.Import, ast.ImportFrom))]
DEFINITIONS = {n.name: n for n in NODES if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
TO_TAKE = [name for name, node in DEFINITIONS.items()
           if sum(banner < node.lineno for banner in BANNERS) in (1, 2, 3, 4, 8)]
LARGE = ["VideoNet", "AudioNet", "make_network", "train_step", "Distiller"]

def names_in(node):
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}

def needed_by(name):
    """Returns the definitions that one needs, by name, and how many calls deep they are."""
    steps, queue = {name: 0}, [name]
    for current in queue:
        for other in names_in(DEFINITIONS[current]) & set(DEFINITIONS) - set(steps):
            steps[other] = steps[current] + 1
            queue.append(other)
    return steps

@pytest.mark.parametrize("name", TO_TAKE)
def test_a_function_runs_below_the_imports_with_what_it_calls(name):
    needed = needed_by(name)
    parts = [node for other, node in DEFINITIONS.items() if other in needed]
    pasted = {}
    exec(compile(ast.Module(IMPORTS + parts, []), "pasted", "exec"), pasted)
    dragged = set()
    for part in parts:
        assert not names_in(part) & (set(vars(xmkd)) - set(pasted))     # no globals of the file
        if part.name != name:
            dragged.update(range(part.lineno, part.end_lineno + 1))
    is_large = name in LARGE or "decode_frames" in needed
    assert len(dragged & CODE) <= (120 if is_large else 40)

def test_the_file_is_as_light_as_it_promises():
    for name, length in ("xmkd.py", 2780), ("test_xmkd.py", 1000), ("README.md", 260):
        assert len((HERE / name).read_text().splitlines()) <= length, "raise it for your additions"
    nodes = list(ast.walk(ast.parse(SOURCE)))
    assert len(nodes) / len(CODE) <= 13.7, "lines are denser than they were"
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            limit = 85 if node.name in ("build_parser", "fit") else 60
            assert node.end_lineno - node.lineno < limit
    assert needed_by("main")["train_step"] <= 4                         # calls deep
    assert len(xmkd.build_parser()._actions) == 42 + 1                  # --help is one more

def blocks_in_readme(language):
    text = (HERE / "README.md").read_text().replace("\\\n", " ")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)

def test_the_commands_in_readme_parse():
    lines = "\n".join(blocks_in_readme("bash")).splitlines()
    commands = [line for line in lines if " xmkd.py" in line]
    assert len(commands) >= 8
    for line in commands:
        options = shlex.split(line.split(" xmkd.py")[1], comments=True)
        args = xmkd.build_parser().parse_args(options)
        assert set(args.method.split(",")) <= {*xmkd.METHODS, "all"}

def test_the_examples_in_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib, write_demo = MagicMock(), xmkd.write_demo
    monkeypatch.setitem(sys.modules, "matplotlib", matplotlib)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", matplotlib.pyplot)
    matplotlib.pyplot.subplots.return_value = None, MagicMock(T=4 * [2 * [MagicMock()]])
    monkeypatch.setattr(xmkd, "write_demo", lambda *given: write_demo(*given, 40, 20))
    assert xmkd.main(["--epochs", "1", "--teacher-epochs", "1", "--workers", "0"]) == 0
    put(tmp_path, "vggsound/vggsound.csv", "abcdefghijk,7,dog,test\n")
    names = dict(vars(xmkd))
    for block in blocks_in_readme("python"):
        exec(textwrap.dedent(block), names)
    rows = (tmp_path / "vggsound/clips.csv").read_text()
    assert rows.split() == ["id,split,labels", "abcdefghijk_000007,eval,dog"]
    example = names["cosine"](xmkd.Distiller("csc", 3, 6, 6), xmkd.Features(P, P, P), TEACHER, None)
    close(example, 1 - F.cosine_similarity(P, TEACHER).mean())
