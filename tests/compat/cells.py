"""Cells that train with libraries which many notebooks use: tiny models from a configuration, data made in memory.

Each goes into `tests.support.resuming.cell`, which gives them `perhaps_die` and `tell`.
"""

from __future__ import annotations

TINY_LLAMA = """
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
words = [f"w{i}" for i in range(60)]
raw = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, **{w: i + 2 for i, w in enumerate(words)}}, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")

def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=1, pad_token_id=1,
        attention_dropout=0.1))

texts = [" ".join(words[(i * j) % 60] for j in range(1, 9)) for i in range(96)]

class Die(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        perhaps_die(state.global_step)
"""

PEFT = (
    TINY_LLAMA
    + """
from peft import LoraConfig, get_peft_model
accelerator = Accelerator()
model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
ids = torch.tensor(tokenizer(texts)["input_ids"])
loader = DataLoader(TensorDataset(torch.arange(96), ids), batch_size=BATCH, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
turn, samples = 0, []
for epoch in range(3):
    for i, x in loader:
        loss = model(input_ids=x, labels=x).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        turn += 1
        samples.append(i.tolist())
        accelerator.log({"loss": loss.item()}, step=turn)
        perhaps_die(turn)
tell(accelerator.unwrap_model(model), samples, turn)
"""
)

DATASETS = (
    TINY_LLAMA
    + """
import datasets
datasets.disable_progress_bars()
rows = datasets.Dataset.from_dict({"i": list(range(96)), "text": texts})
rows = rows.map(lambda row: {"ids": tokenizer(row["text"])["input_ids"]}, remove_columns=["text"])
rows = rows.train_test_split(test_size=0.25, seed=1)["train"].with_format("torch")
accelerator, model = Accelerator(), llama()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 60)
loader = DataLoader(rows, batch_size=BATCH, shuffle=True)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
turn, samples = 0, []
for epoch in range(4):
    for batch in loader:
        loss = model(input_ids=batch["ids"], labels=batch["ids"]).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        turn += 1
        samples.append(batch["i"].tolist())
        run.log(loss=loss, step=turn)
        perhaps_die(turn)
tell(accelerator.unwrap_model(model), samples, turn)
"""
)

TORCHMETRICS = """
import torchmetrics
accelerator, model = Accelerator(), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
accuracy, mean = torchmetrics.Accuracy(task="multiclass", num_classes=4), torchmetrics.MeanMetric()
x = torch.randn(96, 8)
loader = DataLoader(TensorDataset(torch.arange(96), x, x[:, :4].argmax(1)), batch_size=BATCH, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
turn, samples, scores = 0, [], []
for epoch in range(3):
    for i, x, y in loader:
        out = model(x)
        loss = nn.functional.cross_entropy(out, y)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accuracy.update(out, y)
        mean.update(loss.detach())
        turn += 1
        samples.append(i.tolist())
        run.log(loss=loss, step=turn)
        perhaps_die(turn)
    scores.append((accuracy.compute().item(), mean.compute().item()))  # over all ranks
    run.log(accuracy=scores[-1][0], step=turn)
    accuracy.reset()
    mean.reset()
tell(accelerator.unwrap_model(model), samples, turn, scores)
"""

SFT = (
    TINY_LLAMA
    + """
import tempfile
import datasets
from trl import SFTConfig, SFTTrainer
datasets.disable_progress_bars()
arguments = SFTConfig(tempfile.mkdtemp(), max_steps=40, per_device_train_batch_size=BATCH, learning_rate=1e-2, logging_steps=2,
    save_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True, max_length=16, bf16=False, gradient_checkpointing=False)
trainer = SFTTrainer(llama(), arguments, train_dataset=datasets.Dataset.from_dict({"text": texts}), processing_class=tokenizer,
                     callbacks=[Die()])
trainer.train()
model = trainer.model
tell(model, [], trainer.state.global_step, [{k: v for k, v in logs.items() if "runtime" not in k and "per_second" not in k}
                                           for logs in trainer.state.log_history])
"""
)

SCHEDULE_FREE = """
import schedulefree
accelerator, model = Accelerator(), net()
optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2, warmup_steps=10)
loader, held_out = DataLoader(Noisy(), batch_size=BATCH, shuffle=True), DataLoader(Noisy(), batch_size=8)
model, optimizer, loader, held_out = accelerator.prepare(model, optimizer, loader, held_out)
turn, samples, scores = 0, [], []
for epoch in range(3):
    model.train()
    optimizer.train()
    for i, x, y in loader:
        loss = nn.functional.mse_loss(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        turn += 1
        samples.append(i.tolist())
        run.log(loss=loss, step=turn)
        perhaps_die(turn)
    model.eval()
    optimizer.eval()
    with torch.no_grad():
        scores.append(sum(nn.functional.mse_loss(model(x), y).item() for _, x, y in held_out))
tell(accelerator.unwrap_model(model), samples, turn, scores)
"""

FABRIC = """
from lightning import Fabric
fabric = Fabric()
fabric.launch()
model = net()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5)
model, optimizer = fabric.setup(model, optimizer)
loader = fabric.setup_dataloaders(DataLoader(Noisy(), batch_size=BATCH, shuffle=True))
turn, samples = 0, []
for epoch in range(3):
    for i, x, y in loader:
        loss = nn.functional.mse_loss(model(x), y)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        turn += 1
        samples.append(i.tolist())
        fabric.log("loss", loss, step=turn)
        perhaps_die(turn)
tell(model, samples, turn)
"""

QUIET = """logger=False, log_every_n_steps=2, enable_progress_bar=False, num_sanity_val_steps=0,
    enable_checkpointing=False, enable_model_summary=False,"""
LIGHTNING = """
import lightning

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers, self.samples, self.turn, self.scores, self.means = net(), [], 0, [], []

    def training_step(self, batch, number):
        i, x, y = batch
        loss = nn.functional.mse_loss(self.layers(x), y)
        self.samples.append((self.current_epoch, number, i.tolist()))
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        self.means.append(self.trainer.callback_metrics["loss_epoch"].item())

    def on_train_batch_end(self, *_):
        self.turn += 1
        perhaps_die(self.turn)

    def validation_step(self, batch, number):
        _, x, y = batch
        self.log("held_out", nn.functional.mse_loss(self.layers(x), y), sync_dist=True)

    def on_validation_epoch_end(self):
        self.scores.append(round(self.trainer.callback_metrics["held_out"].item(), 6))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]

class Count(lightning.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        self.seen.append((trainer.global_step, number))

model = Module()
trainer = lightning.Trainer(max_epochs=4, logger=False, log_every_n_steps=2, enable_progress_bar=False, num_sanity_val_steps=0,
    enable_checkpointing=False, enable_model_summary=False, gradient_clip_val=1.0,
    callbacks=[Count(), lightning.pytorch.callbacks.EarlyStopping('held_out', patience=50)])
trainer.fit(model, DataLoader(Noisy(), batch_size=BATCH, shuffle=True), DataLoader(Noisy(), batch_size=8))
tell(model, model.samples, model.turn, trainer.global_step, trainer.current_epoch, model.scores,
     model.means, trainer.callbacks[0].seen, trainer.lr_scheduler_configs[0].scheduler.get_last_lr())
"""

CELLS = {
    "peft": PEFT,
    "datasets": DATASETS,
    "torchmetrics": TORCHMETRICS,
    "trl": SFT,
    "schedulefree": SCHEDULE_FREE,
    "fabric": FABRIC,
    "lightning": LIGHTNING,
}
