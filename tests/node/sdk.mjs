// The official Node SDK against a running server; prints what it got as one JSON line.
// usage: node sdk.mjs BASE_URL KEY   (run by tests/test_clients_node.py)
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const model = "default";
const user = (content) => [{ role: "user", content }];
const found = {};

const chat = await client.chat.completions.create({ model, messages: user("hello") });
found.chat = chat.choices[0].message.content;

const stream = client.chat.completions.stream({
  model,
  messages: user("hello"),
  stream_options: { include_usage: true },
});
found.deltas = 0;
stream.on("content", () => (found.deltas += 1));
const final = await stream.finalChatCompletion();
found.stream = final.choices[0].message.content;
found.total = (await stream.totalUsage()).total_tokens;

const runner = client.chat.completions.runTools({
  model,
  stream: true,
  messages: user("tool"),
  tools: [
    {
      type: "function",
      function: {
        name: "get_weather",
        parse: JSON.parse,
        parameters: { type: "object", properties: { city: { type: "string" } } },
        function: ({ city }) => `sunny in ${city}`,
      },
    },
  ],
});
found.tools = await runner.finalContent();

const Place = z.object({ city: z.string() });
const parsed = await client.chat.completions.parse({
  model,
  messages: user("json"),
  response_format: zodResponseFormat(Place, "place"),
});
found.parsed = parsed.choices[0].message.parsed;

const response = await client.responses.create({ model, input: "hello" });
found.response = response.output_text;
found.again = (await client.responses.retrieve(response.id)).output_text;

const events = client.responses.stream({ model, input: "hello" });
found.events = [];
for await (const event of events) found.events.push(event.type);
found.streamed = (await events.finalResponse()).output_text;

const typed = await client.responses.parse({
  model,
  input: "json",
  text: { format: zodTextFormat(Place, "place") },
});
found.typed = typed.output_parsed;

try {
  await client.chat.completions.create({ model: "nobody", messages: user("hello") });
} catch (error) {
  found.error = [error.status, error.code, error.constructor.name];
}
found.models = (await client.models.list()).data.map((one) => one.id);
console.log(JSON.stringify(found));
