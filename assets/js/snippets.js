// Ready programs for the API: {base} is the address, {key} the key, {model} a served name. Until
// Copy is pressed the key is written as $API_KEY; what is copied runs as it is.

export const SNIPPETS = {
  curl: ({ base, key, model }) => `curl ${base}/v1/chat/completions \\
  -H "Authorization: Bearer ${key}" \\
  -H "Content-Type: application/json" \\
  -d '{"model": "${model}", "messages": [{"role": "user", "content": "What is the capital of France?"}]}'
`,

  Python: ({ base, key, model }) => `# pip install openai
from openai import OpenAI

client = OpenAI(base_url="${base}/v1", api_key="${key}")
stream = client.chat.completions.create(
    model="${model}",
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    stream=True,
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
`,

  JavaScript: ({ base, key, model }) => `// Node 18 or newer, or any browser; saved as chat.mjs
const answer = await fetch("${base}/v1/chat/completions", {
  method: "POST",
  headers: { Authorization: "Bearer ${key}", "Content-Type": "application/json" },
  body: JSON.stringify({
    model: "${model}",
    messages: [{ role: "user", content: "What is the capital of France?" }],
  }),
});
if (!answer.ok) throw new Error(await answer.text());
console.log((await answer.json()).choices[0].message.content);
`,

  gradio_client: ({ base }) => `# pip install gradio_client
from gradio_client import Client

client = Client("${base}")
for answer in client.submit("What is the capital of France?", api_name="/chat"):
    print(answer)  # the whole answer so far, each time
`,

  Cursor: ({ base, key, model }) => `Cursor > Settings > Models > API Keys
  OpenAI API Key:            ${key}
  Override OpenAI Base URL:  ${base}/v1
  Add model:                 ${model}
`,

  Codex: ({ base, key, model }) => `# ~/.codex/config.toml, then: export LOCAL_API_KEY="${key}"
model = "${model}"
model_provider = "local"

[model_providers.local]
name = "This server"
base_url = "${base}/v1"
env_key = "LOCAL_API_KEY"
wire_api = "responses"
`,
};
