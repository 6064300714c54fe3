"""As `preflight`, with 30 configurations that were not looked at when its numbers were chosen: other models, batches,
optimizers, plans and ways to train. Nothing in the product is fitted to this table; who does that makes a new one.
"""

from __future__ import annotations

from tests.chaos import preflight
from tests.chaos.preflight import Configuration as C

MODELS = {
    "vit": """
from transformers import ViTConfig, ViTForImageClassification
model = ViTForImageClassification(ViTConfig(hidden_size=384, num_hidden_layers=5, num_attention_heads=6,
                                            intermediate_size=1536, image_size=96, patch_size=8, num_labels=10))
rows = [torch.randn(3, 96, 96) for _ in range(192)]
ask = lambda batch: model(pixel_values=batch, labels=torch.arange(len(batch)) % 10).loss
""",
    "t5": """
from transformers import T5Config, T5ForConditionalGeneration
model = T5ForConditionalGeneration(T5Config(vocab_size=6000, d_model=320, d_kv=40, d_ff=960, num_layers=3, num_heads=8,
                                            decoder_start_token_id=0))
rows = list(torch.randint(0, 6000, (192, 96)))
ask = lambda batch: model(input_ids=batch, labels=batch[:, :64].contiguous()).loss
""",
    "lstm": """
class Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(20000, 256)
        self.lstm = torch.nn.LSTM(256, 512, 2, batch_first=True)
        self.out = torch.nn.Linear(512, 50)
    def forward(self, batch):
        return self.out(self.lstm(self.embed(batch))[0])
model = Tagger()
rows = list(torch.randint(0, 20000, (768, 60)))
ask = lambda batch: torch.nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten() % 50)
""",
    "towers": """
class Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.users, self.items = torch.nn.Embedding(60000, 96), torch.nn.Embedding(40000, 96)
        tower = lambda: torch.nn.Sequential(torch.nn.Linear(96, 512), torch.nn.ReLU(), torch.nn.Linear(512, 96))
        self.user, self.item = tower(), tower()
    def forward(self, batch):
        return self.user(self.users(batch[:, 0])) @ self.item(self.items(batch[:, 1])).T
model = Towers()
rows = list(torch.randint(0, 40000, (6144, 2)))
ask = lambda batch: torch.nn.functional.cross_entropy(model(batch), torch.arange(len(batch)))
""",
    "unet": """
def step(inner, outer):
    return torch.nn.Sequential(torch.nn.Conv2d(inner, outer, 3, padding=1), torch.nn.GroupNorm(8, outer), torch.nn.SiLU())
class UNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = step(3, 32), step(32, 96), step(96, 192)
        self.d, self.e = step(192 + 96, 96), step(96 + 32, 32)
        self.out = torch.nn.Conv2d(32, 3, 1)
        self.down, self.up = torch.nn.MaxPool2d(2), torch.nn.Upsample(scale_factor=2)
    def forward(self, batch):
        a = self.a(batch)
        b = self.b(self.down(a))
        c = self.c(self.down(b))
        d = self.d(torch.cat([self.up(c), b], 1))
        return self.out(self.e(torch.cat([self.up(d), a], 1)))
model = UNet()
rows = [torch.randn(3, 64, 64) for _ in range(72)]
ask = lambda batch: (model(batch) - batch).square().mean()
""",
    "phi": """
from transformers import PhiConfig, PhiForCausalLM
model = PhiForCausalLM(PhiConfig(vocab_size=4096, hidden_size=448, intermediate_size=1344, num_hidden_layers=5,
                                 num_attention_heads=7, max_position_embeddings=256))
rows = list(torch.randint(0, 4096, (96, 192)))
ask = lambda batch: model(input_ids=batch, labels=batch).loss
""",
    "deep": """
class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = torch.nn.LayerNorm(640), torch.nn.Linear(640, 1280), torch.nn.Linear(1280, 640)
    def forward(self, x):
        return x + self.down(torch.nn.functional.dropout(torch.relu(self.up(self.norm(x))), 0.1, self.training))
model = torch.nn.Sequential(*[Residual() for _ in range(12)])
rows = [torch.randn(640) for _ in range(1536)]
ask = lambda batch: model(batch).square().mean()
""",
}  # fmt: skip
CONFIGURATIONS = (
    *(C("vit", 12), C("t5", 12), C("lstm", 64), C("towers", 512), C("unet", 8), C("phi", 8), C("deep", 256)),
    *(C("vit", 24, 2), C("t5", 20, 2), C("lstm", 24, 2), C("towers", 1024, 2), C("unet", 12, 2), C("deep", 512, 2)),
    *(C("vit", 8, 2, "fsdp"), C("t5", 24, 2, "fsdp"), C("phi", 12, 2, "fsdp", optimizer="Adagrad")),
    *(C("phi", 6, 2, "hsdp:2x1"), C("towers", 256, 2, "local-sgd:4", optimizer="SGD+momentum")),
    *(C("unet", 6, 2, "diloco:4,bits=8"), C("t5", 8, 2, "async-ps:4"), C("lstm", 96, 2, "async-ps:2", optimizer="RMSprop")),
    *(C("vit", 16, optimizer="SGD"), C("deep", 384, optimizer="Adamax"), C("phi", 4, optimizer="NAdam")),
    *(C("unet", 10, 2, optimizer="RAdam"), C("t5", 32, optimizer="SGD+momentum"), C("vit", 32, checkpointing=True)),
    *(C("phi", 10, 2, checkpointing=True), C("deep", 64, 2, precision="bf16"), C("towers", 384, precision="bf16")),
)  # fmt: skip


def main(number: float = len(CONFIGURATIONS), begin: float = 0) -> bool:
    """True when no prediction was further away than WORST."""
    return preflight.compare("held_out", MODELS, CONFIGURATIONS[int(begin) : int(number)])
