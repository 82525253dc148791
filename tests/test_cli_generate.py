"""`mambacupy generate`: the tokens of the library, text as it comes, Ctrl-C that keeps what there is, and one-line errors."""

import builtins
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import warnings

import command
import numpy as np
import pytest
import small_models
from command import BAD_STREAMS, files_in, forbid, refused, shell, start

from mambacupy import environment, generate_files
from mambacupy.generation import generate, pad_prompts
from mambacupy.models import MambaConfig, MambaLM

tokenizers = pytest.importorskip("tokenizers", reason="these tests need the package tokenizers (the extra `test`)")


run_any = command.run


@pytest.fixture
def run(run_any):
    """Function that runs `mambacupy generate` in this process."""
    return functools.partial(run_any, "generate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with random weights, and a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "bytes"
    model = MambaLM(MambaConfig(d_model=16, n_layer=2, vocab_size=257))
    params = model.init(np.random.default_rng(0))
    params["embedding"]["weight"] *= 20
    model.save_pretrained(params, path)
    small_models.save_tokenizer(path / "tokenizer.json")
    return path


def expected(folder, prompt, count, **options):
    """Tokens, and their text, of the library."""
    model, params = MambaLM.from_pretrained(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = np.array([tokenizer.encode(prompt).ids])
    made = generate(model, params, tokens, count, **options).tokens
    return made, tokenizer.decode(made[0].tolist())


SAMPLED = {"temperature": 1.5, "top_k": 90, "top_p": 0.95, "min_p": 0.001, "repetition_penalty": 1.1, "seed": 4}


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_text_is_the_librarys(folder, run, tmp_path, options):
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    done = run(folder, "--prompt", "the fox", "-n", 30, "--device", "cpu", "--no-stop", *words, "-o", tmp_path / "t.npy")
    tokens, text = expected(folder, "the fox", 30, **options)
    assert done.code == 0, done.err
    assert np.array_equal(np.load(tmp_path / "t.npy"), tokens)
    assert done.out == text + "\n"
    summary, wrote = done.err.splitlines()
    assert summary.startswith("30 tokens after 7 of prompt, on cpu, ") and summary.endswith(" tokens/s")
    assert wrote == f"wrote {tmp_path / 't.npy'}"


def test_quiet_and_json(folder, run):
    tokens, text = expected(folder, "abc", 12)
    quiet = run(folder, "--prompt", "abc", "-n", 12, "--quiet", "--no-stop", "--device", "cpu")
    assert (quiet.out, quiet.err) == (text + "\n", "")
    facts = json.loads(run(folder, "--prompt", "abc", "-n", 12, "--json", "--no-stop", "--device", "cpu").out)
    assert (facts["text"], facts["tokens"], facts["prompt_tokens"]) == (text, tokens.tolist(), [3])
    assert facts["device"] == "cpu" and facts["tokens_per_second"] > 0 and not facts["interrupted"]


def test_tokens_without_a_tokenizer(folder, run, tmp_path):
    """Rows of a file, shorter ones padded; without a row that can be shown as text."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    model, params = MambaLM.from_pretrained(bare)
    tokens, mask = pad_prompts([[1, 2, 3], [4]], pad=-1)
    wanted = generate(model, params, tokens, 5, mask=mask).tokens
    np.save(tmp_path / "prompts.npy", tokens)
    done = run(bare, "--tokens", tmp_path / "prompts.npy", "--pad", -1, "-n", 5, "-o", tmp_path / "t.npy", "--no-stop")
    assert done.code == 0 and done.out == ""
    assert "5 tokens in each of 2 rows after 4 of prompt" in done.err
    assert np.array_equal(np.load(tmp_path / "t.npy"), wanted)
    np.save(tmp_path / "one.npy", tokens[0])
    done = run(bare, "--tokens", tmp_path / "one.npy", "-n", 5, "--no-stop", "--quiet", "--device", "cpu")
    assert done.out == " ".join(map(str, wanted[0])) + "\n"


def test_stop(folder, run, tmp_path):
    tokens, _ = expected(folder, "abc", 20)
    end = int(tokens[0, 3])
    first = tokens[0].tolist().index(end) + 1
    letter = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(end)
    for words in (["--stop", end], ["--stop", letter]):
        done = run(folder, "--prompt", "abc", "-n", 20, "--json", "--device", "cpu", *words)
        assert json.loads(done.out)["tokens"] == tokens[:, :first].tolist()
    for name in ("config.json", "generation_config.json"):  # the model's own end of text
        other = tmp_path / name
        other.mkdir()
        for file in folder.iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        content = json.loads((other / name).read_text()) if (other / name).exists() else {}
        (other / name).write_text(json.dumps(content | {"eos_token_id": end if name == "config.json" else [999, end]}))
        done = run(other, "--prompt", "abc", "-n", 20, "--json", "--device", "cpu")
        assert json.loads(done.out)["tokens"] == tokens[:, :first].tolist(), name
        done = run(other, "--prompt", "abc", "-n", 20, "--json", "--device", "cpu", "--no-stop")
        assert json.loads(done.out)["tokens"] == tokens.tolist()


def test_characters_of_several_tokens_come_whole(folder):
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "aé🙂 — ü!"
    stream = generate_files.TextStream(tokenizer)
    parts = [stream.add(token) for token in tokenizer.encode(text).ids]
    assert [part for part in parts if part] == list(text)
    assert stream.add(256) == stream.end() == ""
    cut = generate_files.TextStream(tokenizer)
    assert [cut.add(token) for token in tokenizer.encode("x🙂").ids[:-1]] == ["x", "", "", ""]
    assert cut.end() == "\ufffd"
    nonsense = generate_files.TextStream(tokenizer)
    told = [nonsense.add(tokenizer.encode("🙂").ids[1]) for _ in range(20)]
    assert any(told) and "".join(told) + nonsense.end() == "\ufffd" * 20


def test_words_whose_spaces_depend_on_their_neighbours():
    """A decoder that writes the space before a word drops it from the first: the stream must not."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "cat": 1, "sat": 2}, unk_token="a"))
    made.decoder = tokenizers.decoders.WordPiece()
    stream = generate_files.TextStream(made)
    assert [stream.add(token) for token in (0, 1, 2, 1)] == ["a", " cat", " sat", " cat"]


def test_interrupt_keeps_what_there_is(folder, tmp_path):
    """Ctrl-C of a real process, after it has shown some text."""
    line = [folder, "--prompt", "the", "-n", 1_000_000, "--no-stop", "--device", "cpu", "--temperature", 1]
    with start("generate", *line, "-o", tmp_path / "t.npy") as process:
        assert len(process.stdout.read(20)) == 20
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    lines = err.decode().splitlines()
    assert len(lines) == 2 and lines[0].startswith("interrupted: ") and lines[1].startswith("wrote ")
    made = np.load(tmp_path / "t.npy")
    assert made.shape[0] == 1 and lines[0].startswith(f"interrupted: {made.shape[1]} tokens after 3 of prompt")


@pytest.mark.parametrize("case", BAD_STREAMS)
def test_a_bad_standard_output_ends_what_only_it_wanted(folder, tmp_path, case):
    """With -o FILE the run goes on, and the file is whole."""
    redirection, told = BAD_STREAMS[case]
    if "full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    line = f"generate {shlex.quote(str(folder))} --prompt the --no-stop --device cpu --quiet"
    assert shell(f"{line} -n 1000000", redirection) == (1, told)
    for options in ("", "--json"):
        assert shell(f"{line} -n 20 {options} -o {shlex.quote(str(tmp_path / 't.npy'))} --force", redirection) == (1, told)
        assert np.array_equal(np.load(tmp_path / "t.npy"), expected(folder, "the", 20)[0])


def test_text_that_standard_output_cannot_spell(folder):
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    line = f"generate {shlex.quote(str(folder))} --prompt the --no-stop --device cpu --quiet -n 30 --temperature 1.5 --seed 4"
    assert max(expected(folder, "the", 30, temperature=1.5, seed=4)[1]) > "\xff"
    assert shell(line, "", env=environment, stdout=subprocess.DEVNULL) == (0, "")


@pytest.mark.parametrize("name", ["", "no/t.npy", "t/", "pipe"])
def test_an_output_that_cannot_be_is_told_before_the_work(folder, run, tmp_path, monkeypatch, name):
    monkeypatch.setattr(MambaLM, "from_pretrained", lambda *_, **__: pytest.fail("known only when the model is read"))
    os.mkfifo(tmp_path / "pipe")
    done = run(folder, "--prompt", "the", "-o", f"{tmp_path}/{name}", "--force")
    assert refused(done, [f"mambacupy: {os.path.normpath(tmp_path / name)}"])
    assert os.listdir(tmp_path) == ["pipe"]


REFUSED = {
    "neither": ("{model}", "wanted --prompt TEXT or --tokens FILE, one of them"),
    "both": ("{model} --prompt a --tokens {tmp}/t.npy", "wanted --prompt TEXT or --tokens FILE, one of them"),
    "no-folder": ("{tmp}/none --tokens {tmp}/t.npy -o {tmp}/o.npy", "none: no such folder, wanted one with config.json"),
    "no-tokenizer": ("{tmp} --prompt a", "tokenizer.json: no such file; --tokenizer FILE names one, --tokens FILE takes"),
    "bad-tokenizer": ("{model} --prompt a --tokenizer {tmp}/t.npy", "t.npy: not a tokenizer.json ("),
    "empty-prompt": ("{model} --prompt ''", "--prompt: has no token, wanted some text to go on from"),
    "filter": ("{model} --prompt a --top-p 0.9", "top_p is 0.9, but temperature 0 takes the largest logit and draws nothing"),
    "top-p": ("{model} --prompt a --temperature 1 --top-p 2", "top_p is 2.0, wanted a number above 0 and up to 1"),
    "stop": ("{model} --prompt a --stop nothing", "--stop nothing: wanted the number of a token, or one as the tokenizer"),
    "stop-range": ("{model} --prompt a --stop 999", "stop is 999, wanted tokens from 0 to 256"),
    "stop-both": ("{model} --prompt a --stop 1 --no-stop", "--stop and --no-stop exclude each other"),
    "exists": ("{model} --prompt a -o {tmp}/t.npy", "t.npy: exists; --force replaces it"),
    "rows": ("{model} --tokens {tmp}/t.npy", "t.npy: has 2 rows, whose tokens need -o FILE or --json"),
    "range": ("{model} --tokens {tmp}/far.npy", "far.npy: tokens[0, 1] is 257, wanted 0 to 256"),
    "no-tokens": ("{model} --tokens {tmp}/none.npy", "none.npy: row 0 of tokens has no token, wanted at least one"),
    "all-padding": ("{model} --tokens {tmp}/t.npy --pad 1 -o {tmp}/o.npy", "t.npy: row 0 of mask has no token"),
    "no-such-model": ("{tmp}/no --prompt a", "no: no such folder, wanted one with config.json and weights"),
    "model-name-too-long": (f"{'x' * 5000} --prompt a", "xxx: no such folder, wanted one with config.json"),
    "model-is-a-file": ("{tmp}/t.npy --prompt a", "t.npy: no such folder, wanted one with config.json"),
    "tokenizer-is-a-folder": ("{model} --prompt a --tokenizer {tmp}", ": is a folder, wanted a tokenizer.json"),
    "tokenizer-is-a-pipe": ("{model} --prompt a --tokenizer {tmp}/pipe", "pipe: is a pipe, wanted a tokenizer.json"),
    "config-is-a-pipe": ("{tmp}/pipes --tokens {tmp}/t.npy -o {tmp}/o.npy", "pipes/config.json: is no regular file"),
    "not-text": ("{model} --prompt a\udcff", "--prompt: is no text, but other bytes"),
    "cold": (
        "{model} --prompt a --temperature 1e-300",
        "temperature is 1e-300, wanted a finite number, 0 (greedy) or from 1e-20",
    ),
    "end-of-text": ("{tmp}/nested --prompt a", "nested/generation_config.json: not a JSON object (nested too deeply)"),
    "tokens-as-output": ("{model} --tokens {tmp}/t.npy -o {tmp}/t.npy --force", "t.npy: is an input of this run; write"),
    "weights-as-output": ("{model} --prompt a -o {model}/model.safetensors --force", "model.safetensors: is an input of"),
    "tokenizer-as-output": ("{model} --prompt a -o {model}/../bytes/tokenizer.json --force", "tokenizer.json: is an input of"),
    "floats": ("{model} --tokens {tmp}/floats.npy", "floats.npy: float64 (3,), wanted integers (length,) or (batch, length)"),
    "pad": ("{model} --prompt a --pad 0", "--pad is for --tokens FILE"),
    "count": ("{model} --prompt a -n -1", "'-n'"),
    "device": ("{model} --prompt a --device tpu", "--device tpu: wanted auto, cpu, cuda or cuda:N"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_refuses_in_one_line(folder, run, tmp_path, row):
    np.save(tmp_path / "t.npy", np.ones((2, 3), int))
    np.save(tmp_path / "far.npy", np.array([1, 257]))
    np.save(tmp_path / "floats.npy", np.ones(3))
    np.save(tmp_path / "none.npy", np.ones((1, 0), int))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "config.json")
    shutil.copytree(folder, tmp_path / "nested")
    (tmp_path / "nested" / "generation_config.json").write_text("[" * 100_000)
    words, message = REFUSED[row]
    before = files_in(tmp_path) | files_in(folder)
    done = run(*shlex.split(words.format(model=folder, tmp=tmp_path)))
    assert refused(done, [message])
    assert files_in(tmp_path) | files_in(folder) == before


@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_what_must_not_be_read_is_told(folder, run, tmp_path, name):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text("{}")
    forbid(tmp_path / "model" / name)
    try:
        done = run(tmp_path / "model", "--prompt", "a", "-n", 1, "--device", "cpu")
    finally:
        (tmp_path / "model").chmod(0o700)
    assert refused(done, [f"model/{name or 'tokenizer.json'}: Permission denied"])


def test_weights_that_overflow_do_so_without_a_word(folder, run, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    model, params = MambaLM.from_pretrained(folder)
    params["norm_f"]["weight"] = np.full_like(params["norm_f"]["weight"], 3e38)
    model.save_pretrained(params, tmp_path / "model", force=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in ("float32", "float16"):
            done = run(tmp_path / "model", "--prompt", "a", "-n", 2, "--device", "cpu", "--quiet", "--dtype", dtype)
            assert (done.code, done.err) == (0, "")


def test_an_array_in_the_models_folder_may_be_replaced(folder, run, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    for _ in range(2):
        line = ["--prompt", "a", "-n", 2, "-o", tmp_path / "model" / "t.npy", "--force", "--device", "cpu"]
        assert run(tmp_path / "model", *line).code == 0
    assert np.load(tmp_path / "model" / "t.npy").shape == (1, 2)


def test_a_missing_package_is_named_with_its_remedy(folder, run, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    done = run(folder, "--prompt", "a")
    assert refused(done, ['the package tokenizers is not installed: pip install "mambacupy[models]"\n'])


def test_a_missing_gpu_is_explained(folder, run, monkeypatch):
    monkeypatch.setattr(environment, "explain_missing", lambda: "there is none: buy one")
    done = run(folder, "--prompt", "a", "--device", "cuda")
    assert done.code == 2 and done.err == "mambacupy: --device cuda: there is none: buy one\n"
    monkeypatch.setattr(environment, "explain_missing", lambda: None)
    monkeypatch.setattr(environment, "explain_missing_products", lambda: "no cuBLAS: install it")
    done = run(folder, "--prompt", "a", "--device", "cuda")
    assert done.code == 2 and done.err == "mambacupy: --device cuda: no cuBLAS: install it\n"


def test_an_output_is_replaced_by_force(folder, run, tmp_path):
    np.save(tmp_path / "t.npy", np.ones(3))
    done = run(folder, "--prompt", "a", "-n", 0, "-o", tmp_path / "t.npy", "--force", "--device", "cpu")
    assert done.code == 0 and done.out == "" and np.load(tmp_path / "t.npy").shape == (1, 0)
