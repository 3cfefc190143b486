// The OpenAI Agents SDK calling tools through both dialects, streamed and whole, and what the
// public compatibility test for gpt-oss servers asks of the answers; prints one JSON line a run.
// usage: node agents.mjs BASE_URL KEY CASES_JSON   (run by tests/test_clients_node.py)
import { readFileSync } from "node:fs";
import {
  Agent,
  OpenAIChatCompletionsModel,
  OpenAIResponsesModel,
  Runner,
  setTracingDisabled,
  tool,
} from "@openai/agents";
import OpenAI from "openai";

setTracingDisabled(true);
const [baseURL, apiKey, casesFile] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const MODELS = { chat: OpenAIChatCompletionsModel, responses: OpenAIResponsesModel };

function agentFor(one) {
  return new Agent({
    name: one.tool,
    instructions: "Use the tool.",
    tools: [
      tool({
        name: one.tool,
        description: `The tool ${one.tool}.`,
        parameters: one.parameters,
        strict: false,
        execute: async () => one.result,
      }),
    ],
  });
}

async function run(dialect, one, stream) {
  const runner = new Runner({ model: new MODELS[dialect](client, "default") });
  const result = await runner.run(agentFor(one), one.input, { stream, maxTurns: 4 });
  const events = [];
  if (stream) {
    for await (const event of result) {
      if (event.type === "raw_model_stream_event" && event.data.type === "model") {
        events.push(event.data.event);
      }
    }
    await result.completed;
  }
  const calls = result.newItems
    .filter((item) => item.type === "tool_call_item")
    .map((item) => [item.rawItem.name, item.rawItem.arguments]);
  const raw = result.rawResponses.map((response) => response.providerData).filter(Boolean);
  return { dialect, stream, tool: one.tool, calls, final: result.finalOutput, events, raw };
}

for (const one of JSON.parse(readFileSync(casesFile, "utf8"))) {
  for (const dialect of Object.keys(MODELS)) {
    for (const stream of [false, true]) {
      console.log(JSON.stringify(await run(dialect, one, stream)));
    }
  }
}
