"""Tiny random models with full processors, one for each family that the engines must get right.

A family is a function that returns (model, processor) and an entry in `FAMILIES`; what stands there
is asserted by the tests, and `docs/models.md` is made of it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import transformers

from batchvlm.loading import has_torchvision

from ..tiny import Built
from .further import (
    chameleon,
    deepseek_vl_hybrid,
    emu3,
    llava_next_video,
    pp_chart2table,
    qianfan_ocr,
    t5gemma2,
    video_llava,
    vipllava,
)
from .gemma import gemma3, paligemma
from .hybrid import (
    apertus1p5,
    dots3_note,
    glm5_next,
    hy_v4_vl,
    inkling,
    inkling2,
    inkling2_loop,
    mistral_large4,
    mistral_small4,
    nemotron_h_omni,
    qwen4_exp,
)
from .idefics import idefics2, idefics3, smolvlm
from .larger import (
    cohere_compass,
    cosmos3_edge,
    cosmos3_omni,
    hyperclovax_vision_v2,
    kimi_k25,
    llama4,
    minimax_m3_vl,
    muse_glimmer,
    muse_spark,
    qwen2_5_omni,
    qwen3_omni_moe,
    step3p7,
)
from .llava import llava, llava_next, llava_onevision, mistral3, pixtral
from .mixtures import (
    ernie4_5_vl_moe,
    glm4v_moe,
    glm46v,
    glm_ocr,
    paddleocr_vl,
    qwen3_5_moe,
    qwen3_vl_moe,
)
from .newer import (
    aria,
    cohere2_vision,
    fast_vlm,
    gemma3n,
    gemma4,
    gemma4_moe,
    gemma4_unified,
    lfm2_vl,
    perception_lm,
)
from .older import donut, instructblip, kosmos2
from .others import blip_2, deepseek_vl, florence2, janus, mllama, phi4_multimodal
from .qwen import glm4v, qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_vl
from .readers import (
    deepseek_ocr2,
    exaone4_5,
    got_ocr2,
    granite4_vision,
    hunyuan_vl,
    lighton_ocr,
    video_llama_3,
)
from .recent import granite_docling, lfm3_vl, minicpm_ocr, minicpmv4_7, unlimited_ocr
from .tiles import aya_vision, internvl, minicpmv4_6, molmo2, ovis2

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
SLOTS_SINCE = (5, 18)
"""The version of transformers from which on models take image features from outside."""

needs_slots = pytest.mark.skipif(
    VERSION < SLOTS_SINCE, reason="no images over slots before transformers 5.18"
)

LINEAR = "it has layers of linear_attention"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family, and what it makes of the test's pictures."""

    build: Callable[[], Built]
    title: str = ""
    """What people call it."""
    model_class: str = ""
    image_tokens: tuple[int, int, int]
    """Image tokens of a picture of 90 x 60 pixels, one of 70 x 150, and of two in one prompt, of
    48 x 48 and 130 x 100."""
    takes_text_alone: bool = True
    """Whether prompts without an image are allowed."""
    takes_several: bool = True
    """Whether prompts with several images are allowed; without one, they are not either."""
    answers_apart: bool = False
    """Whether the answer stands alone and not behind the prompt: an encoder-decoder."""
    sees_ahead: bool = False
    """Whether image tokens attend to later ones: no prompt is cut, none shares a beginning."""
    has_pages: bool = False
    """Whether its processor takes lists of images within a list as the pages of one document."""
    is_cut: bool = True
    """Whether a prompt with images may be computed in pieces."""
    attention: str | None = "sdpa"
    """What its preset asks for; None if transformers allows that in its decoder alone."""
    why_not_slots: str = ""
    """Why `engine=auto` gives it to `generate()`, as `why_not_slots` says it."""
    is_alone: bool = False
    """Whether `generate()` takes its rows one by one."""
    needs: tuple[str, ...] = ()
    """Modules without which its processor does not load."""
    needs_torchvision_before: tuple[int, int] = (0, 0)
    """The version of transformers from which on it does without."""
    since: tuple[int, int] = (5, 17)
    """The version of transformers that brought it, or the first whose processor does what is asked
    of it here."""

    @property
    def name(self) -> str:
        return self.build.__name__

    @property
    def why_not_slots_here(self) -> str:
        """`why_not_slots` with the transformers that is here."""
        is_of_layers = self.why_not_slots.startswith("it has layers")
        if VERSION >= SLOTS_SINCE or (self.why_not_slots and not is_of_layers):
            return self.why_not_slots
        return f"it takes no image features from outside in transformers {transformers.__version__}"

    @property
    def missing(self) -> list[str]:
        """What it needs and is not here."""
        needs = [*self.needs]
        if self.needs_torchvision_before > VERSION:
            needs.append("torchvision")
        missing = [name for name in needs if not _has(name)]
        if self.since > VERSION:
            missing.append(f"transformers {'.'.join(map(str, self.since))}")
        return missing


def _has(module: str) -> bool:
    if module == "torchvision":
        return has_torchvision()
    return importlib.util.find_spec(module) is not None


HYBRID = "it has layers of hybrid, hybrid_sliding"
INDEXED = "it has layers of indexed_attention"
INDEXED_AND_LINEAR = "it has layers of indexed_attention, linear_attention"
NO_FEATURES = "it gives no image features of its own"

FAMILIES = (
    Family(
        build=apertus1p5,
        title="Apertus 1.5",
        model_class="Apertus1p5ForConditionalGeneration",
        image_tokens=(54, 55, 127),
        attention=None,
        needs=("torchvision",),
        since=(5, 24),
    ),
    Family(
        build=aria,
        title="Aria",
        model_class="AriaForConditionalGeneration",
        image_tokens=(8, 8, 16),
    ),
    Family(
        build=aya_vision,
        title="Aya Vision",
        model_class="AyaVisionForConditionalGeneration",
        image_tokens=(12, 12, 24),
    ),
    Family(
        build=blip_2,
        title="BLIP-2",
        model_class="Blip2ForConditionalGeneration",
        image_tokens=(8, 8, 0),
        takes_text_alone=False,
        takes_several=False,
        why_not_slots="it takes exactly one image a row",
    ),
    Family(
        build=chameleon,
        title="Chameleon",
        model_class="ChameleonForConditionalGeneration",
        image_tokens=(64, 64, 128),
        since=(5, 23),
    ),
    Family(
        build=cohere2_vision,
        title="Command A Vision",
        model_class="Cohere2VisionForConditionalGeneration",
        image_tokens=(80, 64, 160),
        needs=("torchvision",),
    ),
    Family(
        build=cohere_compass,
        title="North Micro Vision",
        model_class="CohereCompassForConditionalGeneration",
        image_tokens=(6, 10, 16),
    ),
    Family(
        build=cosmos3_edge,
        title="Cosmos3 Edge",
        model_class="Cosmos3EdgeForConditionalGeneration",
        image_tokens=(6, 10, 24),
        since=(5, 23),
    ),
    Family(
        build=cosmos3_omni,
        title="Cosmos3",
        model_class="Cosmos3OmniForConditionalGeneration",
        image_tokens=(6, 10, 16),
    ),
    Family(
        build=deepseek_ocr2,
        title="DeepSeek-OCR 2",
        model_class="DeepseekOcr2ForConditionalGeneration",
        image_tokens=(257, 545, 514),
        since=(5, 20),
    ),
    Family(
        build=deepseek_vl,
        title="DeepSeek-VL",
        model_class="DeepseekVLForConditionalGeneration",
        image_tokens=(16, 16, 32),
    ),
    Family(
        build=deepseek_vl_hybrid,
        title="DeepSeek-VL 7B",
        model_class="DeepseekVLHybridForConditionalGeneration",
        image_tokens=(16, 16, 32),
    ),
    Family(
        build=donut,
        title="Donut",
        model_class="VisionEncoderDecoderModel",
        image_tokens=(0, 0, 0),
        takes_text_alone=False,
        takes_several=False,
        attention=None,
        why_not_slots="it is an encoder-decoder",
        is_alone=True,
    ),
    Family(
        build=dots3_note,
        title="dots3 note",
        model_class="Dots3NoteForConditionalGeneration",
        image_tokens=(6, 10, 24),
        why_not_slots=INDEXED,
        needs=("torchvision",),
        since=(5, 23),
    ),
    Family(
        build=emu3,
        title="Emu3",
        model_class="Emu3ForConditionalGeneration",
        image_tokens=(60, 66, 112),
        is_alone=True,
    ),
    Family(
        build=ernie4_5_vl_moe,
        title="ERNIE-4.5-VL",
        model_class="Ernie4_5_VLMoeForConditionalGeneration",
        image_tokens=(6, 10, 24),
    ),
    Family(
        build=exaone4_5,
        title="EXAONE 4.5",
        model_class="Exaone4_5_ForConditionalGeneration",
        image_tokens=(6, 10, 24),
    ),
    Family(
        build=fast_vlm,
        title="FastVLM",
        model_class="FastVlmForConditionalGeneration",
        image_tokens=(4, 4, 8),
        needs=("torchvision", "timm"),
    ),
    Family(
        build=florence2,
        title="Florence-2",
        model_class="Florence2ForConditionalGeneration",
        image_tokens=(50, 50, 0),
        takes_text_alone=False,
        takes_several=False,
        answers_apart=True,
        why_not_slots="it is an encoder-decoder",
    ),
    Family(
        build=gemma3,
        title="Gemma 3",
        model_class="Gemma3ForConditionalGeneration",
        image_tokens=(4, 4, 8),
        sees_ahead=True,
    ),
    Family(
        build=gemma3n,
        title="Gemma 3n",
        model_class="Gemma3nForConditionalGeneration",
        image_tokens=(4, 4, 8),
        needs=("torchvision", "timm"),
    ),
    Family(
        build=gemma4,
        title="Gemma 4 E2B and E4B",
        model_class="Gemma4ForConditionalGeneration",
        image_tokens=(60, 60, 127),
        needs=("torchvision",),
    ),
    Family(
        build=gemma4_moe,
        title="Gemma 4 26B and 31B",
        model_class="Gemma4ForConditionalGeneration",
        image_tokens=(60, 60, 127),
        sees_ahead=True,
        needs=("torchvision",),
    ),
    Family(
        build=gemma4_unified,
        title="Gemma 4 12B",
        model_class="Gemma4UnifiedForConditionalGeneration",
        image_tokens=(60, 60, 127),
        sees_ahead=True,
        needs=("torchvision",),
    ),
    Family(
        build=glm46v,
        title="GLM-4.6V",
        model_class="Glm46VForConditionalGeneration",
        image_tokens=(6, 10, 24),
    ),
    Family(
        build=glm4v,
        title="GLM-4V",
        model_class="Glm4vForConditionalGeneration",
        image_tokens=(6, 10, 24),
    ),
    Family(
        build=glm4v_moe,
        title="GLM-4.5V",
        model_class="Glm4vMoeForConditionalGeneration",
        image_tokens=(6, 10, 24),
    ),
    Family(
        build=glm5_next,
        title="GLM-5.3-Flash",
        model_class="Glm5NextForConditionalGeneration",
        image_tokens=(12, 18, 24),
        why_not_slots=INDEXED_AND_LINEAR,
        since=(5, 18),
    ),
    Family(
        build=glm_ocr,
        title="GLM-OCR",
        model_class="GlmOcrForConditionalGeneration",
        image_tokens=(6, 10, 24),
    ),
    Family(
        build=got_ocr2,
        title="GOT-OCR 2.0",
        model_class="GotOcr2ForConditionalGeneration",
        image_tokens=(256, 256, 512),
        takes_text_alone=False,
        has_pages=True,
        attention=None,
        since=(5, 23),
    ),
    Family(
        build=granite4_vision,
        title="Granite Vision 4",
        model_class="Granite4VisionForConditionalGeneration",
        image_tokens=(14, 16, 34),
    ),
    Family(
        build=granite_docling,
        title="Granite Docling",
        model_class="GraniteDoclingForConditionalGeneration",
        image_tokens=(12, 12, 24),
        since=(5, 23),
    ),
    Family(
        build=hunyuan_vl,
        title="HunyuanOCR",
        model_class="HunYuanVLForConditionalGeneration",
        image_tokens=(10, 17, 25),
        needs_torchvision_before=(5, 22),
    ),
    Family(
        build=hy_v4_vl,
        title="Hy4",
        model_class="HYV4VLForConditionalGeneration",
        image_tokens=(8, 15, 30),
        attention=None,
        why_not_slots=INDEXED,
        since=(5, 24),
    ),
    Family(
        build=hyperclovax_vision_v2,
        title="HyperCLOVA X SEED Think",
        model_class="HyperCLOVAXVisionV2ForConditionalGeneration",
        image_tokens=(6, 10, 24),
        since=(5, 18),
    ),
    Family(
        build=idefics2,
        title="Idefics2",
        model_class="Idefics2ForConditionalGeneration",
        image_tokens=(8, 8, 16),
        needs_torchvision_before=(5, 18),
    ),
    Family(
        build=idefics3,
        title="Idefics3",
        model_class="Idefics3ForConditionalGeneration",
        image_tokens=(20, 12, 40),
        needs_torchvision_before=(5, 18),
    ),
    Family(
        build=inkling,
        title="Inkling",
        model_class="InklingForConditionalGeneration",
        image_tokens=(6, 8, 16),
        why_not_slots=HYBRID,
        needs=("torchvision", "scipy"),
    ),
    Family(
        build=inkling2,
        title="Inkling 2 Small",
        model_class="Inkling2ForConditionalGeneration",
        image_tokens=(6, 8, 16),
        attention=None,
        why_not_slots=HYBRID,
        needs=("torchvision",),
        since=(5, 23),
    ),
    Family(
        build=inkling2_loop,
        title="Inkling 2 Mini",
        model_class="Inkling2LoopForConditionalGeneration",
        image_tokens=(6, 8, 16),
        attention=None,
        why_not_slots=HYBRID,
        needs=("torchvision",),
        since=(5, 24),
    ),
    Family(
        build=instructblip,
        title="InstructBLIP",
        model_class="InstructBlipForConditionalGeneration",
        image_tokens=(8, 8, 0),
        takes_text_alone=False,
        takes_several=False,
        why_not_slots="it takes exactly one image a row",
    ),
    Family(
        build=internvl,
        title="InternVL",
        model_class="InternVLForConditionalGeneration",
        image_tokens=(12, 12, 24),
    ),
    Family(
        build=janus,
        title="Janus",
        model_class="JanusForConditionalGeneration",
        image_tokens=(16, 16, 32),
    ),
    Family(
        build=kimi_k25,
        title="Kimi K2.5",
        model_class="Kimi_K25ForConditionalGeneration",
        image_tokens=(12, 8, 20),
        needs=("torchvision",),
    ),
    Family(
        build=kosmos2,
        title="Kosmos-2",
        model_class="Kosmos2ForConditionalGeneration",
        image_tokens=(0, 0, 0),
        takes_text_alone=False,
        takes_several=False,
        why_not_slots="it takes exactly one image a row",
        is_alone=True,
    ),
    Family(
        build=lfm2_vl,
        title="LFM2-VL",
        model_class="Lfm2VlForConditionalGeneration",
        image_tokens=(76, 42, 156),
        why_not_slots="it has layers of conv",
        needs=("torchvision",),
    ),
    Family(
        build=lfm3_vl,
        title="LFM3-VL",
        model_class="Lfm3VlForConditionalGeneration",
        image_tokens=(6, 10, 16),
        why_not_slots="it has layers of conv",
        since=(5, 23),
    ),
    Family(
        build=lighton_ocr,
        title="LightOnOCR",
        model_class="LightOnOcrForConditionalGeneration",
        image_tokens=(6, 8, 16),
    ),
    Family(
        build=llama4,
        title="Llama 4",
        model_class="Llama4ForConditionalGeneration",
        image_tokens=(20, 16, 24),
        why_not_slots="it has layers of chunked_attention",
        needs=("torchvision",),
    ),
    Family(
        build=llava,
        title="LLaVA",
        model_class="LlavaForConditionalGeneration",
        image_tokens=(16, 16, 32),
    ),
    Family(
        build=llava_next,
        title="LLaVA-NeXT",
        model_class="LlavaNextForConditionalGeneration",
        image_tokens=(70, 56, 106),
    ),
    Family(
        build=llava_next_video,
        title="LLaVA-NeXT-Video",
        model_class="LlavaNextVideoForConditionalGeneration",
        image_tokens=(70, 56, 106),
        needs=("torchvision",),
    ),
    Family(
        build=llava_onevision,
        title="LLaVA-OneVision",
        model_class="LlavaOnevisionForConditionalGeneration",
        image_tokens=(70, 56, 34),
    ),
    Family(
        build=minicpm_ocr,
        title="MiniCPM-OCR",
        model_class="MiniCPMOcrForConditionalGeneration",
        image_tokens=(15, 18, 66),
        why_not_slots=LINEAR,
        needs=("torchvision",),
        since=(5, 22),
    ),
    Family(
        build=minicpmv4_6,
        title="MiniCPM-V 4.6",
        model_class="MiniCPMV4_6ForConditionalGeneration",
        image_tokens=(4, 3, 16),
        why_not_slots=LINEAR,
        needs=("torchvision",),
    ),
    Family(
        build=minicpmv4_7,
        title="MiniCPM-V 4.7",
        model_class="MiniCPMV4_7ForConditionalGeneration",
        image_tokens=(4, 3, 16),
        why_not_slots=LINEAR,
        needs=("torchvision",),
        since=(5, 20),
    ),
    Family(
        build=minimax_m3_vl,
        title="MiniMax M3",
        model_class="MiniMaxM3SparseForConditionalGeneration",
        image_tokens=(6, 10, 24),
        why_not_slots="it has layers of minimax_m3_sparse",
        is_alone=True,
        needs=("torchvision",),
    ),
    Family(
        build=mistral3,
        title="Mistral Small 3",
        model_class="Mistral3ForConditionalGeneration",
        image_tokens=(12, 8, 20),
        needs=("torchvision",),
    ),
    Family(
        build=mistral_large4,
        title="Mistral Large 4",
        model_class="MistralLarge4ForConditionalGeneration",
        image_tokens=(12, 8, 20),
        needs=("torchvision",),
        why_not_slots=INDEXED,
        since=(5, 22),
    ),
    Family(
        build=mistral_small4,
        title="Mistral Small 4",
        model_class="Mistral3ForConditionalGeneration",
        image_tokens=(12, 8, 20),
        needs=("torchvision",),
    ),
    Family(
        build=mllama,
        title="Llama 3.2 Vision",
        model_class="MllamaForConditionalGeneration",
        image_tokens=(1, 1, 2),
        why_not_slots=NO_FEATURES,
        is_alone=True,
    ),
    Family(
        build=molmo2,
        since=(5, 20),
        title="Molmo 2",
        model_class="Molmo2ForConditionalGeneration",
        image_tokens=(10, 10, 18),
        sees_ahead=True,
        needs=("torchvision",),
    ),
    Family(
        build=muse_glimmer,
        title="Muse Glimmer",
        model_class="MuseGlimmerForConditionalGeneration",
        image_tokens=(6, 18, 13),
        needs=("torchvision",),
    ),
    Family(
        build=muse_spark,
        title="Muse Spark",
        model_class="MuseSparkForConditionalGeneration",
        image_tokens=(6, 18, 13),
        needs=("torchvision",),
        since=(5, 20),
    ),
    Family(
        build=nemotron_h_omni,
        title="Nemotron 3 Nano Omni",
        model_class="NemotronH_Omni_Reasoning_V3",
        image_tokens=(15, 12, 24),
        why_not_slots="it has layers of linear_attention, moe",
        needs=("torchvision",),
        since=(5, 23),
    ),
    Family(
        build=ovis2,
        needs_torchvision_before=(5, 18),
        title="Ovis2",
        model_class="Ovis2ForConditionalGeneration",
        image_tokens=(20, 16, 24),
        is_cut=False,
    ),
    Family(
        build=paddleocr_vl,
        title="PaddleOCR-VL",
        model_class="PaddleOCRVLForConditionalGeneration",
        image_tokens=(6, 10, 24),
    ),
    Family(
        build=paligemma,
        title="PaliGemma",
        model_class="PaliGemmaForConditionalGeneration",
        image_tokens=(16, 16, 32),
        takes_text_alone=False,
        sees_ahead=True,
    ),
    Family(
        build=perception_lm,
        title="Perception LM",
        model_class="PerceptionLMForConditionalGeneration",
        image_tokens=(20, 12, 40),
        needs=("torchvision", "timm"),
    ),
    Family(
        build=phi4_multimodal,
        title="Phi-4-multimodal",
        model_class="Phi4MultimodalForCausalLM",
        image_tokens=(460, 417, 1039),
        why_not_slots=NO_FEATURES,
        needs=("torchvision",),
    ),
    Family(
        build=pixtral,
        title="Pixtral",
        model_class="LlavaForConditionalGeneration",
        image_tokens=(35, 32, 72),
        needs=("torchvision",),
    ),
    Family(
        build=pp_chart2table,
        title="PP-Chart2Table",
        model_class="GotOcr2ForConditionalGeneration",
        image_tokens=(256, 256, 512),
        takes_text_alone=False,
        attention=None,
    ),
    Family(
        build=qianfan_ocr,
        title="Qianfan-OCR",
        model_class="QianfanOCRForConditionalGeneration",
        image_tokens=(12, 12, 24),
    ),
    Family(
        build=qwen2_5_omni,
        title="Qwen2.5-Omni",
        model_class="Qwen2_5OmniThinkerForConditionalGeneration",
        image_tokens=(6, 10, 24),
        needs=("torchvision",),
    ),
    Family(
        build=qwen2_5_vl,
        title="Qwen2.5-VL",
        model_class="Qwen2_5_VLForConditionalGeneration",
        image_tokens=(6, 10, 24),
    ),
    Family(
        build=qwen2_vl,
        title="Qwen2-VL",
        model_class="Qwen2VLForConditionalGeneration",
        image_tokens=(6, 10, 24),
    ),
    Family(
        build=qwen3_5,
        title="Qwen3.5",
        model_class="Qwen3_5ForConditionalGeneration",
        image_tokens=(6, 10, 16),
        why_not_slots=LINEAR,
    ),
    Family(
        build=qwen3_5_moe,
        title="Qwen3.5 MoE",
        model_class="Qwen3_5MoeForConditionalGeneration",
        image_tokens=(6, 10, 16),
        why_not_slots=LINEAR,
    ),
    Family(
        build=qwen3_omni_moe,
        title="Qwen3-Omni",
        model_class="Qwen3OmniMoeThinkerForConditionalGeneration",
        image_tokens=(6, 10, 16),
        needs=("torchvision",),
    ),
    Family(
        build=qwen3_vl,
        title="Qwen3-VL",
        model_class="Qwen3VLForConditionalGeneration",
        image_tokens=(6, 10, 16),
    ),
    Family(
        build=qwen3_vl_moe,
        title="Qwen3-VL MoE",
        model_class="Qwen3VLMoeForConditionalGeneration",
        image_tokens=(6, 10, 16),
    ),
    Family(
        build=qwen4_exp,
        title="Qwen4-Exp",
        model_class="Qwen4ExpForConditionalGeneration",
        image_tokens=(6, 10, 16),
        why_not_slots=INDEXED_AND_LINEAR,
        since=(5, 18),
    ),
    Family(
        build=smolvlm,
        title="SmolVLM",
        model_class="SmolVLMForConditionalGeneration",
        image_tokens=(20, 12, 40),
        needs=("torchvision", "num2words"),
    ),
    Family(
        build=step3p7,
        title="Step 3.7 Flash",
        model_class="Step3p7ForConditionalGeneration",
        image_tokens=(4, 10, 14),
        needs=("torchvision",),
    ),
    Family(
        build=t5gemma2,
        title="T5Gemma 2",
        model_class="T5Gemma2ForConditionalGeneration",
        image_tokens=(4, 4, 8),
        answers_apart=True,
        why_not_slots="it is an encoder-decoder",
    ),
    Family(
        build=unlimited_ocr,
        title="Unlimited-OCR",
        model_class="UnlimitedOcrForConditionalGeneration",
        image_tokens=(57, 61, 114),
        why_not_slots="it has layers of reference_sliding_attention",
        needs=("torchvision",),
        since=(5, 20),
    ),
    Family(
        build=video_llama_3,
        title="VideoLLaMA 3",
        model_class="VideoLlama3ForConditionalGeneration",
        image_tokens=(24, 55, 72),
    ),
    Family(
        build=video_llava,
        title="Video-LLaVA",
        model_class="VideoLlavaForConditionalGeneration",
        image_tokens=(16, 16, 32),
        needs=("torchvision",),
        since=(5, 22),
    ),
    Family(
        build=vipllava,
        title="ViP-LLaVA",
        model_class="VipLlavaForConditionalGeneration",
        image_tokens=(16, 16, 32),
    ),
)
