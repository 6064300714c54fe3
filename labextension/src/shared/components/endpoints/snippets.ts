// How an endpoint is asked from elsewhere; the key stands there by name only. Values in, text out.

export interface Snippet {
  readonly title: string;
  readonly text: string;
}

/**
 * A request in curl, Python and JavaScript; by the Open Inference Protocol for what generates no text.
 * `inputs` is JSON that it can be asked with, where it has told some.
 */
export function snippets(url: string, name: string, kind = 'generator', inputs = ''): Snippet[] {
  if (kind === 'embedder') {
    return embeddings(url, name);
  }
  if (kind !== 'generator') {
    return predictions(`${url.replace(/\/v1$/, '/v2')}/models/${encodeURIComponent(name)}/infer`, inputs || (INPUTS[kind] ?? '["Hello"]'));
  }
  const model = JSON.stringify(name);
  const body = `{"model": ${model}, "messages": [{"role": "user", "content": "Hello"}]}`;
  return [
    curl(`${url}/chat/completions`, body),
    openai(
      url,
      'answer = client.chat.completions.create(',
      `    model=${model},`,
      '    messages=[{"role": "user", "content": "Hello"}],',
      ')',
      'print(answer.choices[0].message.content)'
    ),
    {
      title: 'JavaScript',
      text: [
        `const answer = await fetch(${JSON.stringify(`${url}/chat/completions`)}, {`,
        "  method: 'POST',",
        '  headers: {',
        "    'Content-Type': 'application/json',",
        '    Authorization: `Bearer ${process.env.LLMCLOUD_API_KEY}`',
        '  },',
        `  body: JSON.stringify(${body})`,
        '});',
        'console.log((await answer.json()).choices[0].message.content);'
      ].join('\n')
    }
  ];
}

function embeddings(url: string, name: string): Snippet[] {
  const model = JSON.stringify(name);
  return [
    curl(`${url}/embeddings`, `{"model": ${model}, "input": "Hello"}`),
    openai(url, `answer = client.embeddings.create(model=${model}, input="Hello")`, 'print(answer.data[0].embedding)')
  ];
}

function curl(url: string, body: string): Snippet {
  const lines = [
    `curl '${url}' \\`,
    '  -H "Authorization: Bearer $LLMCLOUD_API_KEY" \\',
    "  -H 'Content-Type: application/json' \\",
    `  -d '${body}'`
  ];
  return { title: 'curl', text: lines.join('\n') };
}

/** A program that asks by OpenAI's package. */
function openai(url: string, ...lines: string[]): Snippet {
  const client = `client = OpenAI(base_url=${JSON.stringify(url)}, api_key=os.environ["LLMCLOUD_API_KEY"])`;
  return { title: 'Python', text: ['import os', 'from openai import OpenAI', '', client, ...lines].join('\n') };
}

// What stands for the inputs, where texts are not what is asked.
const INPUTS: Record<string, string> = {
  'image-classifier': '"BASE64 of a file"',
  module: '"NUMBERS IN LISTS"',
  python: '"WHAT ITS predict TAKES"'
};

function predictions(url: string, inputs: string): Snippet[] {
  const body = `{"inputs": ${inputs}}`;
  return [
    curl(url, body),
    {
      title: 'Python',
      text: [
        'import os',
        'import httpx',
        '',
        'headers = {"Authorization": f"Bearer {os.environ[\'LLMCLOUD_API_KEY\']}"}',
        `print(httpx.post(${JSON.stringify(url)}, headers=headers, json=${body}).json())`
      ].join('\n')
    }
  ];
}
