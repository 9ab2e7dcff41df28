"""Small models of KerasHub, made by their constructors: what `fit` preprocesses, probes see."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_probes import LinearProbeCallback, extract_features

keras_hub = pytest.importorskip("keras_hub", reason="KerasHub is optional")

pytestmark = pytest.mark.slow  # CI runs these; importing KerasHub takes its time

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


def compiled(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, weighted_metrics=["accuracy"])
    return model


@pytest.mark.parametrize("mode", ["shared", "isolated"])
def test_a_text_classifier_on_strings(mode, tmp_path):
    x, y = texts()
    model, probes = compiled(bert()), LinearProbeCallback(mode=mode)
    history = model.fit(x, y, epochs=2, verbose=0, callbacks=[probes]).history
    assert probes.results.refits[-1].left_out == {}
    errors = {key: values[-1] for key, values in history.items() if "probe_error" in key}
    assert errors
    assert np.isfinite(list(errors.values())).all()
    everything = LinearProbeCallback("all", mode=mode)
    model.fit(x, y, verbose=0, callbacks=[everything])
    assert any("token ids" in reason for reason in everything.results.left_out.values())

    # A probe on the embeddings, averaged over the words, against one's own average.
    last = "bert_backbone/transformer_layer_0"
    probes = LinearProbeCallback(last, mode=mode)
    model.fit(x, y, validation_data=(x, y), verbose=0, callbacks=[probes])
    inputs = model.preprocessor(tf.constant(x))
    layer = model.backbone.get_layer("transformer_layer_0")
    taken = keras.Model(model.backbone.inputs, layer.output)(inputs).numpy()
    mask = inputs["padding_mask"].numpy()[..., None]
    average = (taken * mask).sum(axis=1) / mask.sum(axis=1)
    kernel, bias = probes.weights(last)
    wrong = np.mean((average @ kernel + bias).argmax(axis=1) != y)
    assert probes.results.measured("error", split="validation")["value"][last] == wrong
    store = extract_features(model, (x, y), tmp_path / "s", layers=last, verbose=False)
    assert store.features(last).shape == (64, 8)


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


def test_a_language_model_is_probed_for_what_its_texts_are():
    """Its labels and weights are by token; the probe's own are one per text."""
    x = ["abca", "bbca", "cabc", "abab"] * 16
    first = lambda x, y: tf.cast(x["token_ids"][:, 1] > 1, tf.int32)  # noqa: E731
    model = compiled(gpt2())
    probes = LinearProbeCallback("*/transformer_layer_0", target=first, num_classes=2)
    model.fit(x, epochs=2, batch_size=16, verbose=0, callbacks=[probes])
    rows = probes.results.measured("error")
    assert (rows["n"] == 64).all()
    assert rows["certificate"].notna().all()
