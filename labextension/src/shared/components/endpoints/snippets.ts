// How an endpoint is asked from elsewhere; the key stands there by name only. Values in, text out.

export interface Snippet {
  readonly title: string;
  readonly text: string;
}

/** A request in curl, Python and JavaScript. */
export function snippets(url: string, name: string): Snippet[] {
  const model = JSON.stringify(name);
  const body = `{"model": ${model}, "messages": [{"role": "user", "content": "Hello"}]}`;
  return [
    {
      title: 'curl',
      text: [
        `curl '${url}/chat/completions' \\`,
        '  -H "Authorization: Bearer $LLMCLOUD_API_KEY" \\',
        "  -H 'Content-Type: application/json' \\",
        `  -d '${body}'`
      ].join('\n')
    },
    {
      title: 'Python',
      text: [
        'import os',
        'from openai import OpenAI',
        '',
        `client = OpenAI(base_url=${JSON.stringify(url)}, api_key=os.environ["LLMCLOUD_API_KEY"])`,
        'answer = client.chat.completions.create(',
        `    model=${model},`,
        '    messages=[{"role": "user", "content": "Hello"}],',
        ')',
        'print(answer.choices[0].message.content)'
      ].join('\n')
    },
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
