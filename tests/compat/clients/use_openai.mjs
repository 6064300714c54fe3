// The `openai` client of npm against the gateway: whole, streamed, tools, formats, responses, embeddings, errors.
import assert from "node:assert/strict";
import OpenAI, { BadRequestError, AuthenticationError, NotFoundError } from "openai";

const here = { baseURL: process.env.LLMC_URL, apiKey: process.env.LLMC_KEY, maxRetries: 0 };
const client = new OpenAI(here);
const GREETING = "Good day, I am a tiny model.";
const messages = [{ role: "user", content: "Hello" }];
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"], additionalProperties: false };
const tools = [{ type: "function", function: { name: "get_weather", parameters } }];
const model = "talker";

const reply = await client.chat.completions.create({ model, messages, temperature: 0 });
assert.equal(reply.choices[0].message.content, GREETING);
let text = "", usage = null;
for await (const chunk of await client.chat.completions.create({ model, messages, temperature: 0, stream: true, stream_options: { include_usage: true } })) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, GREETING);
assert.ok(usage.total_tokens > 0);
const asked = [];
const runner = client.chat.completions.runTools({ model, messages, temperature: 0, tools: [{ type: "function", function: { name: "get_weather", parameters, parse: JSON.parse, function: ({ city }) => { asked.push(city); return "sunny"; } } }] });
assert.equal(await runner.finalContent(), "It is sunny in Paris.");
assert.deepEqual(asked, ["Paris"]);
const stream = client.chat.completions.stream({ model, messages, temperature: 0, tools });
const final = await stream.finalChatCompletion();
assert.deepEqual(JSON.parse(final.choices[0].message.tool_calls[0].function.arguments), { city: "Paris" });
const schema = { type: "object", properties: { ok: { type: "boolean" } }, required: ["ok"], additionalProperties: false };
const typed = await client.chat.completions.parse({ model, messages, max_tokens: 60, response_format: { type: "json_schema", json_schema: { name: "v", strict: true, schema } } });
assert.equal(typeof typed.choices[0].message.parsed.ok, "boolean");
const response = await client.responses.create({ model, input: "Hello", temperature: 0 });
assert.equal(response.output_text, GREETING);
const events = client.responses.stream({ model, input: "Hello", temperature: 0 });
assert.equal((await events.finalResponse()).output_text, GREETING);
const again = await client.responses.create({ model, input: "Hello", previous_response_id: response.id, temperature: 0 });
assert.ok(again.usage.input_tokens > 0);
assert.equal((await client.embeddings.create({ model, input: ["a", "b"] })).data.length, 2);
assert.ok((await client.models.list()).data.some((one) => one.id === model));
await assert.rejects(client.chat.completions.create({ model, messages, temperature: 9 }), (error) => error instanceof BadRequestError && error.param === "temperature");
await assert.rejects(new OpenAI({ ...here, apiKey: "sk-llmc-wrong" }).models.list(), AuthenticationError);
await assert.rejects(client.models.retrieve("nobody"), (error) => error instanceof NotFoundError || error.status === 403);
const cut = await client.chat.completions.create({ model, messages, stream: true });
for await (const _ of cut) break; // hangs up
console.log("ok");
