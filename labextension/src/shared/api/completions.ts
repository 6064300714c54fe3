// The OpenAI surface of the server, as the playground asks it: an answer that streams.
import type { Connection } from './connection';

/** What is asked, besides the text. */
export interface Sampling {
  readonly max_tokens?: number;
  readonly temperature?: number;
  readonly top_p?: number;
  readonly seed?: number;
}

export interface Message {
  readonly role: 'user' | 'assistant';
  readonly content: string;
}

/** Ask a model, piece by piece. A chat where `asked` is a list of messages, else a text that is continued. */
export async function* stream(
  connection: Connection,
  model: string,
  asked: readonly Message[] | string,
  sampling: Sampling,
  signal: AbortSignal
): AsyncGenerator<string> {
  const isChat = typeof asked !== 'string';
  const url = `${connection.baseUrl}llmcloud/v1/${isChat ? 'chat/completions' : 'completions'}`;
  const body = { model, stream: true, ...sampling, ...(isChat ? { messages: asked } : { prompt: asked }) };
  const response = await fetch(url, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json', ...connection.headers() },
    body: JSON.stringify(body),
    credentials: 'same-origin',
    signal
  });
  if (!response.ok || !response.body) {
    const refusal = (await response.json().catch(() => null)) as { error?: { message?: string } } | null;
    throw new Error(refusal?.error?.message ?? `The server answered with status ${response.status}.`);
  }
  for await (const data of events(response.body)) {
    if (data === '[DONE]') {
      return;
    }
    yield piece(data);
  }
  throw new Error('The answer broke off.');
}

function piece(data: string): string {
  const event = JSON.parse(data) as {
    error?: { message?: string };
    choices?: { text?: string; delta?: { content?: string | null } }[];
  };
  if (event.error) {
    throw new Error(event.error.message ?? 'The answer broke off.');
  }
  const [choice] = event.choices ?? [];
  return choice?.delta?.content ?? choice?.text ?? '';
}

/** The data of server-sent events, however they are cut into chunks. */
export async function* events(body: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = '';
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += decoder.decode(value, { stream: !done });
      const lines = rest.split(/\r?\n/);
      rest = lines.pop() ?? '';
      for (const line of lines) {
        if (line.startsWith('data:')) {
          yield line.slice(5).trim();
        }
      }
      if (done) {
        return;
      }
    }
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}
