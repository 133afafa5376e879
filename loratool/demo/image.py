"""The image half of the demo: a tiny Stable Diffusion UNet, its LoRA in PEFT's and in kohya's format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratool.demo.stage import Stage, fit, furthest

if TYPE_CHECKING:
    from torch import Tensor


def play(stage: Stage) -> None:
    """Train on noise, convert there and back, let diffusers load the file."""
    live = _train(stage)
    stage.run("convert", "unet-lora", out="style.safetensors", to="kohya")
    stage.narrator.prose(
        "One file, as kohya's scripts write it. diffusers loads it by its own code on a fresh copy of the UNet; the"
        " outputs against PEFT's live model:"
    )
    fresh = _unet_class().from_pretrained("unet").eval()
    probe = _batch(seed=1)
    wanted, plain = _denoise(live, probe), _denoise(fresh, probe)
    _load_by_diffusers(fresh, "style.safetensors")
    stage.fact("for scale: largest difference, UNet without the LoRA", furthest(wanted, plain))
    apart = furthest(wanted, _denoise(fresh, probe))
    stage.promise("convert: largest difference, diffusers to PEFT", apart, 1e-5)

    stage.narrator.prose("And back to PEFT:")
    stage.run("convert", "style.safetensors", out="style-peft", to="peft")
    stage.narrator.prose("Names and metadata were rewritten twice, the factors not once:")
    stage.promise("convert: factors that changed, to kohya and back", _changed("unet-lora", "style-peft"), 0)
    distance = stage.run("compare", "unet-lora", "style.safetensors").totals["distance"]
    stage.narrator.prose("The same update in two formats:")
    stage.promise("compare: distance, PEFT folder to kohya file", distance, 0)


def _train(stage: Stage) -> Any:
    """Build the UNet, train an adapter for it, save both, and return PEFT's live model."""
    from peft import LoraConfig, get_peft_model

    stage.narrator.heading("6. Image models: from PEFT to kohya and back")
    stage.narrator.prose(
        "A UNet with the blocks of Stable Diffusion 1, only tiny and with random weights; a LoRA on its attention and"
        " on some convolutions, alpha 6 at rank 4, trained for a moment on noise."
    )
    unet = _unet_class()(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=32,
    )
    unet.save_pretrained("unet")
    layers = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "downsamplers.0.conv"]
    live = get_peft_model(unet, LoraConfig(r=4, lora_alpha=6, target_modules=layers))
    batch, noise = _batch(seed=0), _batch(seed=2)["sample"]

    def loss() -> Tensor:
        difference: Tensor = live(**batch).sample - noise
        return difference.square().mean()

    with stage.narrator.working("training the image adapter") as advance:
        losses = fit([p for p in live.parameters() if p.requires_grad], loss, steps=10, rate=5e-3, advance=advance)
    stage.fact("loss on noise, first and last step", [losses[0], losses[-1]])
    live.eval()
    live.save_pretrained("unet-lora")
    return live


def _batch(seed: int) -> dict[str, Tensor]:
    import torch

    random = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(4, 4, 8, 8, generator=random),
        "timestep": torch.randint(1000, (4,), generator=random),
        "encoder_hidden_states": torch.randn(4, 6, 32, generator=random),
    }


def _denoise(model: Any, batch: dict[str, Tensor]) -> Tensor:
    import torch

    with torch.no_grad():
        output: Tensor = model(**batch).sample
    return output


def _load_by_diffusers(unet: Any, file: str) -> None:
    """What StableDiffusionPipeline.load_lora_weights does, for a UNet without its pipeline."""
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin as Loader

    state, alphas = Loader.lora_state_dict(file, unet_config=unet.config, local_files_only=True)
    Loader.load_lora_into_unet(state, network_alphas=alphas, unet=unet)


def _changed(one: str, two: str) -> int:
    """Count the tensors of two PEFT folders that are not the same bits under the same name."""
    from safetensors.torch import load_file

    first, second = (load_file(f"{folder}/adapter_model.safetensors") for folder in (one, two))
    same = [n for n in first if n in second and first[n].dtype == second[n].dtype and first[n].equal(second[n])]
    return len(first.keys() | second.keys()) - len(same)


def _unet_class() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel
