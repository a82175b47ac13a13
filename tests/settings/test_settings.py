"""Every YAML composes; every mistake is refused by name, in one line."""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from batchvlm.config import JobConfig, SourceKind, TaskName
from batchvlm.errors import ConfigError, ExitCode
from batchvlm.settings.checks import check_config
from batchvlm.settings.compose import compose, conf_dir, to_plain

GROUPS = sorted(p for p in conf_dir().iterdir() if p.is_dir())
OPTIONS = [f"{p.name}={y.stem}" for p in GROUPS for y in sorted(p.glob("*.yaml"))]
PRIMARY = sorted(y.stem for y in conf_dir().glob("*.yaml"))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes(option: str) -> None:
    required = {
        "data=parquet": ["data.path=in.parquet"],
        "data=hf": ["data.path=user/dataset"],
        "data=folder": ["data.path=images"],
        "data=jsonl": ["data.path=in.jsonl"],
        "task=dialog": ["data.columns.turns=turns"],
        "data=webdataset": ["data.path=in.tar"],
        "data=openai": ["data.path=requests.jsonl"],
        "model=hub": ["model.path=user/model"],
        "engine=endpoint": ["engine.endpoint.url=http://localhost:8000"],
    }
    cfg = compose("run", [option, *required.get(option, [])])
    assert isinstance(cfg, JobConfig)


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.startswith("model=")])
def test_no_preset_runs_a_strangers_code(option: str) -> None:
    path = ["model.path=user/model"] if option == "model=hub" else []
    assert compose("run", [option, *path]).model.trust_remote_code is False


@pytest.mark.parametrize("name", PRIMARY)
def test_every_primary_config_composes(name: str) -> None:
    cfg = compose(name)
    expected = TaskName({"run": "caption", "animals": "extract"}.get(name, name))
    assert cfg.task.name is expected
    assert cfg.output.dir == f"outputs/demo-{expected.value}"


def test_there_are_options_to_test() -> None:
    assert {"run", "caption", "vqa", "extract"} <= set(PRIMARY)
    assert len(OPTIONS) > 10


def test_settings_are_frozen_and_typed() -> None:
    cfg = compose("run", ["data=hf", "data.path=a/b", "generation.stop=['a','b']"])
    assert cfg.data.source is SourceKind.hf
    assert list(cfg.generation.stop) == ["a", "b"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.data.path = "elsewhere"  # type: ignore[misc]


REFUSED = {
    "data.pth=x": "data.pth is no setting; did you mean data.path?",
    "temperature=1": "temperature is no setting; did you mean generation.temperature?",
    "generation.temprature=1": "did you mean generation.temperature?",
    "+extra=1": "extra is no setting",
    "+data.extra=1": "data.extra is no setting",
    "in.parquet": "in.parquet is no setting, which is written key=value; an input is named by data",
    "task.prompt": "task.prompt has no value; write task.prompt=...",
    "it?": """a text with spaces is quoted, as in 'task.prompt="What is it?"'; an input is named""",
    "model=qwen2_5vl": "model=qwen2_5vl is no option of model; did you mean model=qwen2_5_vl? ",
    "data=in.parquet": "one of your own is written data=parquet data.path=in.parquet",
    "data=in.csv": "data=in.csv is no option of data; there are demo, folder, hf, jsonl, openai",
    "model=org/name": "one of your own is written model=hub model.path=org/name",
    "data.path=in.parquet": "data.path=in.parquet is set, but no kind of input; write data=parquet "
    "data.path=in.parquet (or data=hf, folder, jsonl, openai, webdataset)",
    "model.path=org/name": "model.path=org/name is set together with the demo's settings; write "
    "model=hub model.path=org/name",
    "hydra/launcher=slurm": "hydra/launcher=slurm is no option of hydra/launcher; there are basic",
    "task=cption": "task=cption is no option of task; did you mean task=caption? ",
    "task=other": "task=other is no option of task; there are caption, ",
    "task.output.regex=[0-9]{3}": """write 'task.output.regex="[0-9]{3}"'""",
    "data.path=[a,b]": "data.path takes one text and no list; write 'data.path=",
    "output.dir=[a,b]": "output.dir takes one text and no list",
    'task.prompt="It costs ${{ price }}"': "in a template a dollar is {{ '$' }}",
    'task.prompt="It costs ${price}"': "in a template a dollar is {{ '$' }}",
    "task.output.guided=strict": "task.output.guided has no effect with task=caption",
    "task.prompt={{ a }}": """write 'task.prompt="{{ a }}"'""",
    "generation.stop=[é, b]": """write 'generation.stop=["é","b"]'""",
    "data=é.parquet": """write data=parquet 'data.path="é.parquet"'""",
    "é=1": "é is no setting; write key=value",
    "task.prompt=Is it red, or blue?": "task.prompt has a comma outside quotes; a text: "
    """'task.prompt="Is it red, or blue?"'; several jobs (a sweep): put -m first""",
    "data.columns.image=a,b": "a list: 'data.columns.image=[a,b]'; several jobs",
    "output.keep_columns=a,b": "a list: 'output.keep_columns=[a,b]'; several jobs",
    "task=caption,vqa": "task names several options; keep one of them; or, several jobs (a sweep)",
    "data=parqet": "data=parqet is no option of data; did you mean data=parquet? ",
    "data=parquet": "data.path is required and not set; add data.path=",
    "engine=endpoint": "engine.endpoint.url is required and not set; add engine.endpoint.url=http",
    "model=hub": "model.path is required",
    "generation.max_new_tokens=many": "generation.max_new_tokens: Value 'many'",
    "generation.max_new_tokens=0": "generation.max_new_tokens=0 must lie between 1 and",
    "generation.min_new_tokens=999": "generation.min_new_tokens=999 must lie between 0 and 256",
    "generation.num_return_sequences=0": "generation.num_return_sequences=0 must lie between 1 and",
    "generation.num_return_sequences=2": "set generation.temperature above 0",
    "generation.temperature=-1": "generation.temperature=-1.0 must lie between 0 and",
    "generation.temperature=nan": "generation.temperature=nan must lie between",
    "generation.top_p=0": "generation.top_p=0.0 must lie",
    "generation.seed=-1": "generation.seed=-1 must lie",
    "generation.stop=x": "generation.stop=x is no list; write 'generation.stop=[x]'",
    "output.keep_columns=id": "write 'output.keep_columns=[id]'",
    "data.columns.image=[image": "write a list as 'data.columns.image=[image]'",
    "data.columns.image=a,b]": "write a list as 'data.columns.image=[a,b]'",
    "output.dir=a-[x,y]": """write 'output.dir="a-[x,y]"'""",
    "data.path=null": "data.path cannot be null; give it a value: data.path=...",
    "output.dir=${oc.env:NO_SUCH}": "output.dir: KeyError raised while resolving interpolation",
    "generation.stop=['']": "generation.stop holds an empty string",
    "generation.columns.seed=''": "generation.columns.seed is empty",
    "batching.max_batch_tokens=0": "batching.max_batch_tokens=0 must be at least 1",
    "output.rows_per_shard=0": "output.rows_per_shard=0 must be at least 1",
    "output.flush_every_s=-1": "output.flush_every_s=-1.0 must be at least 0",
    "output.flush_every_s=inf": "output.flush_every_s=inf must be at most 1,000,000,000 seconds",
    "runtime.grace_s=inf": "runtime.grace_s=inf must be at most",
    "engine.memory_fraction=90": "engine.memory_fraction=90.0 must lie between 0.01 and 1",
    "engine.memory_fraction=nan": "engine.memory_fraction=nan must lie between",
    "runtime.task_id=1": "runtime.task_id=1 must lie between 0 and runtime.num_tasks - 1 = 0",
    "runtime.num_workers=-1": "runtime.num_workers=-1 must be at least 0",
    "model.dtype=f32": "model.dtype=f32 must be one of auto, float32, bfloat16, float16",
    "model.dtype={text_config: f32}": "model.dtype.text_config=f32 must be one of auto, float32,",
    "model.dtype={}": "model.dtype={} names no part",
    "model.dtype=[float32]": "model.dtype=['float32'] must be one of auto, float32",
    "model.quantization=int3": "expected one of [quanto_int8, quanto_int4,",
    "model.quantization_skip=[a]": "quantization_skip has no effect without model.quantization",
    "model.adapter_revision=a": "model.adapter_revision has no effect without model.adapter",
    "model.gpus_per_replica=2": "gpus_per_replica has no effect without model.device_map or",
    "model.tp_plan=yes": "model.tp_plan=yes must be auto, or null",
    "model.gpus_per_replica=0": "model.gpus_per_replica=0 must be at least 1",
    "model.device_map=gpu": "model.device_map=gpu must be one of auto, balanced,",
    "model.image_backend=opencv": "expected one of [auto, pil, torchvision]",
    "engine.device=gpu": "engine.device=gpu must be auto, cpu, cuda",
    "data.columns.image={a: 1}": "data.columns.image",
    "data.streaming=true": "data.streaming has no effect with data.source=parquet",
    "data.split=test": "data.split has no effect with data.source=parquet; it belongs to data=hf",
    "data.path=": "data.path is empty",
    "data.image_root=": "data.image_root is empty",
    "output.dir=": "output.dir is empty",
    "model.path=": "model.path is empty",
    "data.columns.turns=x": "has no effect with task=caption; choose task=dialog",
    "task=dialog": "task=dialog has no turns; set data.columns.turns=COLUMN",
    "data.fetch_attempts=0": "data.fetch_attempts=0 must be at least 1",
    "task.continue_final_message=true": "no effect without data.columns.messages",
    "data.allow_hosts=[x]": "data.allow_hosts has no effect without data.allow_remote=true",
    "task.output.json_schema=s.json": "has no effect with task=caption; choose task=extract",
}


def numbers_of(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The path of each number among the settings, and whether it may have a fraction."""
    for name, kind in get_type_hints(type(group)).items():
        kinds = {kind, *get_args(kind)}
        if dataclasses.is_dataclass(kind):
            yield from numbers_of(getattr(group, name), (*path, name))
        elif kinds & {int, float} and bool not in kinds:
            yield (*path, name), float in kinds


def with_number(group: Any, path: tuple[str, ...], value: float) -> Any:
    """The settings with another value at this path."""
    name, *rest = path
    new = with_number(getattr(group, name), tuple(rest), value) if rest else value
    return dataclasses.replace(group, **{name: new})


def refusal(cfg: JobConfig, path: tuple[str, ...], value: float) -> str:
    """The error of settings with this number; empty if there is none."""
    try:
        check_config(with_number(cfg, path, value))
    except ConfigError as error:
        return str(error)
    return ""


MAY_BE_ZERO = {
    *("engine.endpoint.patience_s", "generation.min_new_tokens", "generation.temperature"),
    *("generation.top_k", "generation.min_p", "generation.frequency_penalty"),
    *("generation.presence_penalty", "generation.seed", "output.flush_every_s"),
    *("retry.invalid_json", "runtime.task_id", "runtime.num_workers", "runtime.max_error_rate"),
    "runtime.walltime_margin_s",
}


def test_every_number_has_bounds_that_its_error_names() -> None:
    cfg = compose("run")
    found = {".".join(path): (path, has_fraction) for path, has_fraction in numbers_of(cfg)}
    assert len(found) > 40
    for name, (path, has_fraction) in found.items():
        for value in (-3, math.nan, math.inf) if has_fraction else (-3,):
            assert refusal(cfg, path, value).startswith(f"{name}={value} must ")
        at_zero = refusal(cfg, path, 0)
        assert at_zero.startswith("" if name in MAY_BE_ZERO else f"{name}=0 must ")
        assert bool(at_zero) != (name in MAY_BE_ZERO)
        # A one may have no effect without other settings, but is within the bounds.
        assert has_fraction or " must " not in refusal(cfg, path, 1) or name == "runtime.task_id"


ENDPOINT = ("engine=endpoint", "engine.endpoint.url=http://node7:8000/v1")
REFUSED_OF_A_SERVER = {
    "engine.endpoint.url=null": "engine.endpoint.url is required and not set",
    "engine.endpoint.url=node7:8000": "engine.endpoint.url is not an http or https URL",
    "engine.endpoint.url=http://": "engine.endpoint.url is not an http or https URL",
    "engine.endpoint.url='http://[::1'": "engine.endpoint.url is not an http or https URL",
    "engine.endpoint.url=http://me:secret@node7": "holds a user, a query or a fragment",
    "engine.endpoint.url='http://node7/v1?key=secret'": "holds a user, a query or a fragment",
    "engine.endpoint.token_env=sk-secret": "token_env is no name of an environment variable",
    "engine.endpoint.max_concurrency=0": "max_concurrency=0 must lie between 1 and 1024",
    "engine.endpoint.timeout_s=0": "engine.endpoint.timeout_s=0.0 must be at least 0.1",
    "engine.endpoint.patience_s=-1": "engine.endpoint.patience_s=-1.0 must be at least 0",
    "engine.endpoint.image_format=bmp": "expected one of [png, jpeg]",
    "engine.endpoint.extra_body.messages=[]": "extra_body.messages is set by the engine",
    "generation.top_k=3": "add it to engine.endpoint.extra_body",
    "generation.min_p=0.1": "engine=endpoint cannot send generation.min_p",
    "generation.ignore_eos=true": "engine=endpoint cannot send generation.ignore_eos",
    "model.chat_template_kwargs.a=1": "add them to engine.endpoint.extra_body.chat_template_kwargs",
    "model.prompt_tokens=[a]": "engine=endpoint cannot apply model.prompt_tokens",
    "generation.skip_special_tokens=false": "cannot send generation.skip_special_tokens",
    "output.token_ids=true": "engine=endpoint does not support output.token_ids",
    "model.max_prompt_tokens=9": "does not support model.max_prompt_tokens",
    "engine=auto": "engine.endpoint.url has no effect with engine=auto",
}


@pytest.mark.parametrize("override", list(REFUSED_OF_A_SERVER))
def test_what_a_server_cannot_do_is_refused_and_no_secret_repeated(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("run", [*ENDPOINT, override])
    assert REFUSED_OF_A_SERVER[override] in str(caught.value)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_servers_own_settings_pass_through() -> None:
    cfg = compose("run", [*ENDPOINT, "engine.endpoint.extra_body.chat_template_kwargs={a: true}"])
    assert cfg.engine.endpoint.extra_body == {"chat_template_kwargs": {"a": True}}


@pytest.mark.parametrize("override", list(REFUSED))
def test_a_mistake_is_refused_in_one_line(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("run", [override])
    assert REFUSED[override] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize(
    "value",
    ["é", "a (1)", "a+b", "it's", "a#b", "~x", 'say "yes"', "it's $5", "a=b", "{{ a }}", "(C:\\",
     """both ' and \\" """, "red, blue", '"open', '"{{ a | join(", ") }}"'],
)  # fmt: skip
def test_what_to_write_instead_is_read_as_it_was_meant(value: str) -> None:
    try:
        assert compose("run", [f"task.prompt={value}"]).task.prompt == value
    except ConfigError as error:
        message = str(error)
    else:
        return
    written = message.partition("; ")[2].removeprefix("write ").removeprefix("a text: ")
    (override,) = shlex.split(written.partition("; several jobs")[0])
    assert compose("run", [override]).task.prompt == (
        value.strip('"') if value.startswith('"') else value
    )


def test_a_path_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    paths = (
        *("data.path", "data.image_root", "model.path", "model.adapter", "output.dir"),
        *("task.output.json_schema", "tracking.dir", "tracking.prometheus_file"),
    )
    options = ("task=extract", "data=parquet", "model=hub")
    cfg = compose("run", [*options, *(f'{key}="~/x"' for key in paths)])
    assert {attrgetter(key)(cfg) for key in paths} == {"/home/me/x"}


NO_HOSTS = [
    *("x:80", "x/a", "", "file:///", "FILE://x", "local://etc"),
    *("http://images.intra", "HTTPS://images.intra/", "[::1]:80", "[::1", "10.0.0.0/8", "127.1"),
    *("*.intra", "me@images.intra", "images intra", "://x", "images..intra"),
]


@pytest.mark.parametrize("entry", NO_HOSTS)
def test_what_is_no_host_is_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.allow_hosts"):
        compose("run", ["data.allow_remote=true", f"data.allow_hosts=['{entry}']"])


CHOOSING = ("task=extract", "data=parquet", "data.path=x")


@pytest.mark.parametrize(
    "override",
    [
        "task.output.choice=[true,false]",
        "task.output.choice=[a,True]",
        "task.output.choice=[a,null]",
        "task.output.choice=[a,[b]]",
        "generation.stop=[false]",
    ],
)
def test_what_is_no_text_is_not_made_one(override: str) -> None:
    with pytest.raises(ConfigError, match=f"^{override.partition('=')[0]}"):
        compose("run", [*CHOOSING, override])


@pytest.mark.parametrize(
    "key",
    [
        *("output.keep_columns", "data.columns.image", "data.allow_hosts", "generation.stop"),
        *("retry.errors", "model.prompt_tokens", "task.output.choice"),
    ],
)
def test_a_null_in_a_list_of_texts_says_how_to_quote_the_word(key: str) -> None:
    for nulls in ("[null]", "[a,null]"):
        with pytest.raises(ConfigError) as caught:
            compose("run", [*CHOOSING, f"{key}={nulls}"])
        assert str(caught.value) == (
            f"{key} holds a null, which is no text; if the word is meant, quote it: "
            f"""'{key}=["null"]'"""
        )
    compose("run", ['output.keep_columns=["null"]', 'data.columns.image=["null"]'])


def test_words_of_a_file_that_yaml_takes_for_truth_values_are_refused(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    for text, is_refused in (("[yes, no]", True), ('["yes", "no"]', False)):
        preset = f"defaults: [extract]\noutput:\n  choice: {text}\n"
        (tmp_path / "task" / "mine.yaml").write_text(preset)
        given = [f"hydra.searchpath=[file://{tmp_path}]", "task=mine", *CHOOSING[1:]]
        if is_refused:
            with pytest.raises(ConfigError, match=r"true stands for a truth value") as caught:
                compose("run", given)
            assert '["yes", "no"]' in str(caught.value.hint)
        else:
            assert compose("run", given).task.output.choice == ["yes", "no"]


def test_numbers_and_quoted_words_are_texts() -> None:
    cfg = compose("run", [*CHOOSING, 'task.output.choice=["true",1,2.5]', "generation.stop=[3]"])
    assert cfg.task.output.choice == ["true", "1", "2.5"]
    assert cfg.generation.stop == ["3"]


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(ConfigError, match=r"needs aiohttp.*pip install 'batchvlm\[remote\]'"):
        compose("run", ["data.allow_remote=true"])


def test_hosts_and_places_are_taken() -> None:
    hosts = "[images.intra,images_2.intra.,'bücher.de',10.0.0.5,'[::1]','::1','s3://bucket/folder','hf://datasets/a/b']"
    compose("run", ["data.allow_remote=true", f"data.allow_hosts={hosts}"])


def test_a_default_may_be_repeated() -> None:
    compose("run", ["data.split=train", "data.streaming=false", "data.subset=null"])


BROKEN = {
    b"path: [a\nb: {\n": "my.yaml, line 2: no YAML that can be read: expected ',' or ']'",
    b"path: a\npath: b\n": "my.yaml, line 2: no YAML that can be read: found duplicate key path",
    b"path: \xff\n": "a file of your configuration: no YAML that can be read: 'utf-8' codec",
    b"- path\n": "list is not a subclass of ModelConfig",
}


@pytest.mark.parametrize("content", list(BROKEN))
def test_a_broken_preset_of_ones_own_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "my.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        compose("run", [f"hydra.searchpath=[file://{tmp_path}]", "model=my"])
    assert BROKEN[content] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_processors_own_settings_pass_through() -> None:
    cfg = compose("run", ["model.processor_kwargs.min_pixels=3136", "+model.processor_kwargs.a=1"])
    assert cfg.model.processor_kwargs == {"min_pixels": 3136, "a": 1}


def test_the_demos_schema_is_for_the_demos_images_alone() -> None:
    assert compose("extract").task.output.json_schema
    with pytest.raises(ConfigError, match="task=extract has no schema"):
        compose("extract", ["data=parquet", "data.path=scans.parquet"])


def test_impossible_combinations() -> None:
    with pytest.raises(ConfigError, match="task=extract has no schema"):
        compose("extract", ["task.output.json_schema=null"])
    with pytest.raises(ConfigError, match="Config group override must be"):
        compose("run", ["generation=null"])
    with pytest.raises(ConfigError, match=r"task.prompt is empty"):
        compose("run", ["data.columns.image=null", "task.prompt=''"])
    for other in ("image=null", "messages=chat"):
        with pytest.raises(ConfigError, match=r"image_optional has no effect without image col"):
            compose("run", [f"data.columns.{other}", "data.columns.image_optional=true"])


def test_to_plain_is_json_ready() -> None:
    plain = to_plain(compose("extract"))
    assert plain["task"]["name"] == "extract" and type(plain["task"]["name"]) is str
    assert plain["generation"]["stop"] == []


def test_trackers_write_on_a_disk() -> None:
    """To them the name of an object store is one of a folder here."""
    store = ["output.dir=s3://bucket/out", "tracking.trackers=[tensorboard]"]
    with pytest.raises(ConfigError, match=r"in an object store; set tracking\.dir to a folder"):
        compose("run", store)
    with pytest.raises(ConfigError, match=r"tracking\.dir=s3://b/x is a URL"):
        compose("run", [*store, "tracking.dir=s3://b/x"])
    assert compose("run", [*store, "tracking.dir=here"]).tracking.dir == "here"
    compose("run", ["output.dir=file:///tmp/out", "tracking.trackers=[tensorboard]"])


@pytest.mark.parametrize("key", ["data.path", "output.dir"])
def test_a_password_does_not_get_into_the_output(key: str) -> None:
    given = f"{key}='s3://key:hunter2@bucket/x'"
    with pytest.raises(ConfigError, match=f"{key} is a URL with a password") as caught:
        compose(overrides=["data=parquet", "data.path=x", given])
    assert "hunter2" not in str(caught.value)
    compose(overrides=["data=parquet", "data.path='abfs://box@account.dfs.core.windows.net/x'"])
