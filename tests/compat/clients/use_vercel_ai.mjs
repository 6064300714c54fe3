// Vercel's `ai` against the gateway, by its provider for compatible servers and by that of OpenAI (responses).
import assert from "node:assert/strict";
import { embedMany, generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createOpenAI } from "@ai-sdk/openai";
import { z } from "zod";

const here = { baseURL: process.env.LLMC_URL, apiKey: process.env.LLMC_KEY };
const GREETING = "Good day, I am a tiny model.";
const compatible = createOpenAICompatible({ name: "llmcloud", ...here, supportsStructuredOutputs: true });
const openai = createOpenAI(here);
for (const [name, model] of [["compatible", compatible("talker")], ["chat", openai.chat("talker")], ["responses", openai.responses("talker")]]) {
  const shared = { model, temperature: 0, maxRetries: 0 };
  assert.equal((await generateText({ ...shared, prompt: "Hello" })).text, GREETING, name);
  let text = "";
  for await (const piece of streamText({ ...shared, prompt: "Hello", onError: ({ error }) => { throw error; } }).textStream) text += piece;
  assert.equal(text, GREETING, name);
  const asked = [];
  const tools = { get_weather: tool({ description: "Weather.", inputSchema: z.object({ city: z.string() }), execute: async ({ city }) => { asked.push(city); return "sunny"; } }) };
  const done = await generateText({ ...shared, prompt: "weather?", tools, stopWhen: stepCountIs(3) });
  assert.deepEqual([done.text, asked], ["It is sunny in Paris.", ["Paris"]], name);
  const { object } = await generateObject({ ...shared, prompt: "Hello", schema: z.object({ ok: z.boolean() }), maxOutputTokens: 60 });
  assert.equal(typeof object.ok, "boolean", name);
}
const { embeddings } = await embedMany({ model: openai.textEmbeddingModel ? openai.textEmbeddingModel("talker") : openai.embedding("talker"), values: ["a", "b"] });
assert.equal(embeddings.length, 2);
console.log("ok");
