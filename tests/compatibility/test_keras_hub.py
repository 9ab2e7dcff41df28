"""Small models of KerasHub, made by their constructors: what `fit` preprocesses, probes see.

One of each kind: a text encoder, a decoder with a language model's head, a ViT, a ResNet and a
segmenter, with random weights; one of them with LoRA, one of them in int8.
"""

from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.special import logsumexp

from keras_probes import LinearProbeCallback, extract_features

keras_hub = pytest.importorskip("keras_hub", reason="KerasHub is optional")

pytestmark = pytest.mark.slow  # CI runs these; importing KerasHub takes its time

NEAR = {"rel": 1e-4, "abs": 1e-6}  # float32 against float64
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "dog", "runs", "sleeps"]


def texts(n=64):
    rng = np.random.default_rng(7)
    x = [" ".join(rng.choice(WORDS[5:], rng.integers(2, 7))) for _ in range(n)]
    return x, np.array(["fox" in text for text in x]).astype("int32")


def bert():
    tokenizer = keras_hub.models.BertTokenizer(vocabulary=WORDS)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=8)
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=10, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16,
        max_sequence_length=8,
    )  # fmt: skip
    return keras_hub.models.BertTextClassifier(backbone, 2, preprocessor)


def vit():
    converter = keras_hub.layers.ViTImageConverter(image_size=(16, 16), scale=0.1, offset=-5.0)
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(16, 16, 3), patch_size=8, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16
    )
    preprocessor = keras_hub.models.ViTImageClassifierPreprocessor(image_converter=converter)
    return keras_hub.models.ViTImageClassifier(backbone, 2, preprocessor, pooling="gap")


def gpt2():
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}
    tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary=vocabulary, merges=["a b"])
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=6)
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=5, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16,
        max_sequence_length=6,
    )  # fmt: skip
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor)


def compiled(model, optimizer="sgd"):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=[], weighted_metrics=["accuracy"])
    return model


class Host(NamedTuple):
    """A host, its data, and what is known of it by hand.

    `tap`, the output of `layer` in `network`, is looked at closely. Every path runs through the
    taps `auto`, and some path past the taps `branches`.
    """

    model: keras.Model
    data: tuple
    network: keras.Model
    layer: str
    tap: str
    auto: tuple[str, ...]
    branches: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...] = ()


def images(n=64, size=16):
    x = np.random.default_rng(8).random((n, size, size, 3)).astype("float32")
    x[::2, : size // 2] *= 0.5
    return x, (np.arange(n) % 2).astype("int32")


def text_encoder():
    model, block = bert(), "bert_backbone/transformer_layer_0"
    return Host(
        model, texts(), model.backbone, "transformer_layer_0", block,
        ("bert_backbone/embeddings_add", f"{block}/self_attention_layer_norm", "logits"),
        ("bert_backbone/token_embedding", f"{block}/self_attention_layer/value"),
    )  # fmt: skip


def decoder():
    """Its labels are the next tokens."""
    model, block = gpt2(), "gpt2_backbone/transformer_layer_0"
    rng = np.random.default_rng(9)
    data = model.preprocessor(
        ["".join(rng.choice([*"abc"], rng.integers(2, 5))) for _ in range(64)]
    )
    model.preprocessor = None
    return Host(
        model, data, model.backbone, "transformer_layer_0", block,
        ("gpt2_backbone/embeddings_add", "gpt2_backbone/layer_norm", "token_embedding"),
        (f"{block}/feedforward_layer_norm", f"{block}/self_attention/attention_output"),
        (("input[token_ids]", "token ids"),),
    )  # fmt: skip


def vision_transformer():
    model, encoder = vit(), "vi_t_backbone/vit_encoder"
    x, y = images()
    return Host(
        model, (x * 255, y), model.backbone, "vit_encoder", encoder,
        ("input", "vi_t_backbone/vit_patching_and_embedding", "mean", "predictions"),
        (f"{encoder}/transformer_block_1/mha/query", f"{encoder}/transformer_block_1/mlp/dense_1"),
    )  # fmt: skip


def resnet():
    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64], input_conv_kernel_sizes=[3], stackwise_num_filters=[64, 16],
        stackwise_num_blocks=[1, 1], stackwise_num_strides=[1, 2], block_type="basic_block",
        image_shape=(16, 16, 3),
    )  # fmt: skip
    model, block = keras_hub.models.ResNetImageClassifier(backbone, 2), "stack1_block0"
    return Host(
        model, images(), backbone, f"{block}_out", f"res_net_backbone/{block}_out",
        ("input", "res_net_backbone/conv1_conv", f"res_net_backbone/{block}_add", "predictions"),
        (f"res_net_backbone/{block}_1_conv", f"res_net_backbone/{block}_0_conv"),
    )  # fmt: skip


def segmenter():
    """A SegFormer; its labels are of pixels, as many as probes use of an image."""
    encoder = keras_hub.models.MiTBackbone(
        layerwise_depths=[1, 1], num_layers=2, layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[2, 1], max_drop_path_rate=0.0, layerwise_patch_sizes=[3, 3],
        layerwise_strides=[2, 2], image_shape=(8, 8, 3), hidden_dims=[8, 12],
    )  # fmt: skip
    backbone = keras_hub.models.SegFormerBackbone(encoder, projection_filters=8)
    model, name = keras_hub.models.SegFormerImageSegmenter(backbone, 2), "seg_former_backbone"
    x, _ = images(size=8)
    return Host(
        model, (x, (x[..., 0] > 0.5).astype("int32")), encoder, "output_level_1",
        f"{name}/functional/output_level_1",
        ("input", f"{name}/concatenate", "resizing_1"),
        (f"{name}/linear_12", f"{name}/functional/output_level_0"),
        ((f"{name}/functional/hierarchical_encoder_0_0", "no such positions"),),
    )  # fmt: skip


def output_of(host, layer):
    """What a layer of the host's network makes of its data, by Keras alone; the data as well."""
    x, y, weights = keras.utils.unpack_x_y_sample_weight(host.model.preprocess_samples(*host.data))
    values = keras.Model(host.network.inputs, host.network.get_layer(layer).output)(x)
    return np.asarray(values), x, np.asarray(y), weights


def by_hand(host):
    """Features at `host.tap`, labels, and which rows count.

    Rows are positions where labels are: what there is in the cell that each falls into. Else they
    are examples: of a sequence the average over all that is no padding.
    """
    values, x, y, weights = output_of(host, host.layer)
    if y.ndim > 1:
        sizes = zip(values.shape[1:-1], y.shape[1:], strict=True)
        cells = (
            places * own // size
            for places, (own, size) in zip(np.indices(y.shape[1:]), sizes, strict=True)
        )
        rows = values[(slice(None), *cells)].reshape(-1, values.shape[-1])
        return rows, y.ravel(), np.ones(y.size, bool) if weights is None else np.ravel(weights) > 0
    if values.ndim == 3:
        mask = x["padding_mask"] if isinstance(x, dict) else np.ones(values.shape[:2])
        mask = np.asarray(mask, "float32")[..., None]
        values = (values * mask).sum(axis=1) / mask.sum(axis=1)
    return values.reshape(len(y), -1), y, np.ones(len(y), bool)


def loss_by_hand(probes, tap, features, labels):
    kernel, bias = probes.weights(tap)
    answers = features @ kernel + bias
    return logsumexp(answers, axis=1) - answers[np.arange(len(labels)), labels]


def loss_of(probes, tap):
    return probes.results.measured("loss", split="validation")["value"][tap]


def fit(model, data, probes):
    """An epoch, with the same data for validation."""
    x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
    model.fit(x, y, sample_weight=weights, validation_data=data, verbose=0, callbacks=[probes])


@pytest.mark.parametrize("mode", ["shared", pytest.param("isolated", marks=pytest.mark.weekly)])
@pytest.mark.parametrize("make", [text_encoder, decoder, vision_transformer, resnet, segmenter])
def test_a_host_of_each_kind(make, mode, tmp_path):
    host = make()
    model, before = compiled(host.model), host.model.get_weights()
    probes = LinearProbeCallback(["auto", host.tap], mode=mode)
    fit(model, host.data, probes)
    assert any(np.any(old != new) for old, new in zip(before, model.get_weights(), strict=True))
    measured = probes.results.measured("error", split="validation")
    assert set(host.auto) <= set(measured.index)
    assert set(host.branches).isdisjoint(measured.index)
    for tap, reason in host.left_out:
        assert reason in probes.results.left_out[tap]
    assert np.isfinite(measured["value"]).all()
    assert probes.results.refits[-1].left_out == {}
    assert (measured["certificate"] < 0.01).all()
    features, labels, counted = by_hand(host)
    assert set(measured["n"]) == {counted.sum()}
    loss = loss_by_hand(probes, host.tap, features, labels)[counted].mean()
    assert loss_of(probes, host.tap) == pytest.approx(loss, **NEAR)

    if mode == "shared":  # it has no part in what follows
        taps = ["auto", *host.branches, host.tap]
        store = extract_features(model, host.data, tmp_path / "s", layers=taps, verbose=False)
        assert {tap.name for tap in store.taps} == {*measured.index, *host.branches}
        np.testing.assert_allclose(store.features(host.tap)[:], features, atol=1e-5)
        np.testing.assert_array_equal(store.labels()[counted], labels[counted])


@pytest.mark.parametrize(("mode", "layers"), [("shared", "all"), ("isolated", "auto")])
def test_a_segmenter_is_probed_for_what_its_images_are(mode, layers):
    """Its labels are of pixels; the probe's own are one per image: whether it is bright above."""
    host = segmenter()
    bright = lambda x, y: tf.cast(tf.reduce_any(y[:, :4] > 0, axis=(1, 2)), tf.int32)  # noqa: E731
    probes = LinearProbeCallback(layers, target=bright, num_classes=2, mode=mode)
    fit(compiled(host.model), host.data, probes)
    measured = probes.results.measured("error", split="validation")
    block = "hierarchical_encoder_0_0"
    tap = f"seg_former_backbone/functional/{block}"
    assert {tap, *host.auto} <= set(measured.index)
    assert (layers == "all") == (set(host.branches) <= set(measured.index))
    assert (measured["certificate"] < 0.01).all()
    host = host._replace(data=(host.data[0], np.arange(64) % 2), layer=block)
    loss = loss_by_hand(probes, tap, *by_hand(host)[:2]).mean()
    assert loss_of(probes, tap) == pytest.approx(loss, **NEAR)


@pytest.mark.parametrize("mode", ["shared", pytest.param("isolated", marks=pytest.mark.weekly)])
def test_a_language_model_with_lora_is_probed_for_what_its_texts_are(mode, tmp_path):
    """Its labels and weights are by token; the probe's own are one per text."""
    model, x = gpt2(), ["abca", "bbca", "cabc", "abab"] * 16
    named = {layer.name: layer for layer in model._flatten_layers()}
    query, norm = named["query"], named["self_attention_layer_norm"]
    frozen = np.array(query.kernel)
    model.backbone.enable_lora(rank=2)
    before = model.get_weights()
    first = lambda x, y: tf.cast(x["token_ids"][:, 1] > 1, tf.int32)  # noqa: E731
    tap = "gpt2_backbone/transformer_layer_0/self_attention/query"
    probes = LinearProbeCallback("all", target=first, num_classes=2, mode=mode)
    fit(compiled(model, keras.optimizers.Adam(0.1)), (x,), probes)
    moved = {
        weight.path.split("attention/")[-1]
        for weight, old in zip(model.weights, before, strict=True)
        if np.any(weight != old)
    }
    kernels = {f"{name}/lora_kernel_{part}" for name in ("query", "value") for part in "ab"}
    assert moved == kernels | {"query/bias", "value/bias"}  # KerasHub trains these biases too

    left_out = probes.results.left_out
    assert "token ids" in left_out["input[token_ids]"]
    assert "an attention map" in left_out.values()
    measured = probes.results.measured("error", split="validation")
    assert set(measured["n"]) == {64}
    assert (measured["certificate"] < 0.01).all()
    host = Host(model, (x,), model.backbone, "embeddings_add", tap, (), ())
    embedded, tokens, *_ = output_of(host, "embeddings_add")
    labels = (np.asarray(tokens["token_ids"])[:, 1] > 1).astype("int32")
    a, b = np.asarray(query.lora_kernel_a), np.asarray(query.lora_kernel_b)
    adapted, plain = (
        np.einsum("btd,dhk->bthk", norm(embedded), kernel) + np.asarray(query.bias)
        for kernel in (frozen + a @ b, frozen)
    )
    assert np.abs(adapted - plain).max() > 0.1
    features = adapted.reshape(64, -1)
    loss = loss_by_hand(probes, tap, features, labels).mean()
    assert loss_of(probes, tap) == pytest.approx(loss, **NEAR)
    if mode == "shared":
        store = extract_features(
            model, (x,), tmp_path / "s", layers=tap, target=first, num_classes=2, verbose=False
        )
        np.testing.assert_allclose(store.features(tap)[:], features, atol=1e-5)


def in_int8(x, layer):
    """What a `Dense` layer of int8 weights computes: x is rounded too, row by row."""
    scale = 127 / np.abs(x).max(axis=1, keepdims=True)
    whole = np.round(x * scale) @ np.asarray(layer._kernel, "float32")
    return whole / (scale * np.asarray(layer.kernel_scale)) + np.asarray(layer.bias)


def test_an_int8_vision_transformer(tmp_path):
    """Probes of the model as it was are asked what they make of the quantized one."""
    host = vision_transformer()
    model, probes = compiled(host.model), LinearProbeCallback(["mean", host.tap])
    fit(model, host.data, probes)
    before, *_ = by_hand(host)
    model.quantize("int8")
    compiled(model)
    logs = model.evaluate(*host.data, callbacks=[probes], return_dict=True, verbose=0)
    features, labels, _ = by_hand(host)
    assert np.abs(features - before).max() > 1e-3
    loss = loss_by_hand(probes, host.tap, features, labels).mean()
    assert logs[f"probe_loss/{host.tap}"] == pytest.approx(loss, **NEAR)
    taps = ["mean", host.tap, "predictions"]
    store = extract_features(model, host.data, tmp_path / "s", layers=taps, verbose=False)
    np.testing.assert_allclose(store.features(host.tap)[:], features, atol=1e-5)
    logits = in_int8(store.features("mean")[:], model.get_layer("predictions"))
    np.testing.assert_allclose(store.features("predictions")[:], logits, atol=1e-5)


def test_a_network_within_a_task_is_refitted_on_what_its_fit_makes_of_strings():
    x, y = texts()
    model = compiled(bert())
    inner = {"model": lambda m: m.backbone, "num_classes": 2}
    probes = LinearProbeCallback("transformer_layer_0", **inner)
    model.fit(x, y, epochs=2, verbose=0, callbacks=[probes])
    refitted = probes.refit((x, y), validation=None, test=None, l2=1e-4, verbose=False)
    assert refitted.table()["train error"].iloc[0] <= probes.results.table()["train error"].iloc[0]


def test_an_image_classifier_sees_what_fit_makes_of_images(tmp_path):
    rng = np.random.default_rng(8)
    x = rng.integers(0, 256, (64, 20, 20, 3)).astype("float32")
    x[::2, :10] *= 0.5
    y = (np.arange(64) % 2).astype("int32")
    model, probes = compiled(vit()), LinearProbeCallback(["input", "predictions"], reduce="gap")
    model.fit(x, y, epochs=2, verbose=0, callbacks=[probes])
    store = extract_features(
        model, (x, y), tmp_path / "s", layers="input", reduce="gap", verbose=False
    )
    expected = np.asarray(model.preprocessor(tf.constant(x))).mean(axis=(1, 2))
    np.testing.assert_allclose(store.features("input")[:], expected, atol=1e-4)
    table = probes.refit((x, y), validation=None, test=None, l2=1e-3, verbose=False)
    own = 1 - model.evaluate(x, y, verbose=0, return_dict=True)["accuracy"]
    rows = table.measured("error", split="train")
    assert rows["host"].iloc[0] == pytest.approx(own)
