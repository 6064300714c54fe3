// The playground: what it sends after an answer, and after none.
import { render } from 'preact';
import { afterEach, expect, test, vi } from 'vitest';

import { makeConnection } from '../src/shared/api/connection';
import { Playground, samplingOf } from '../src/shared/components/endpoints/playground';
import type { Client } from '../src/shared/stores/client';

const place = document.createElement('div');
document.body.append(place);
afterEach(() => {
  render(null, place);
  vi.unstubAllGlobals();
});

const refusal = () => new Response(JSON.stringify({ error: { message: 'no replica is ready' } }), { status: 503 });
const answer = (text: string) =>
  new Response(`data: ${JSON.stringify({ choices: [{ delta: { content: text } }] })}\n\ndata: [DONE]\n\n`);

/** A playground whose server answers with these, one after the other; what it was sent. */
function playground(...answers: Response[]) {
  const sent: Record<string, unknown>[] = [];
  vi.stubGlobal('fetch', async (_url: string, init: RequestInit) => {
    sent.push(JSON.parse(String(init.body)) as Record<string, unknown>);
    return answers.shift();
  });
  const client = { connection: makeConnection('http://h/', '') } as unknown as Client;
  render(<Playground client={client} name="poet" isReady />, place);
  return sent;
}

const area = () => place.querySelector('textarea') as HTMLTextAreaElement;
const button = (text: string) => [...place.querySelectorAll('button')].find(one => one.textContent === text) as HTMLButtonElement;
async function ask(sent: readonly unknown[], text: string) {
  const before = sent.length;
  area().value = text;
  area().dispatchEvent(new Event('input', { bubbles: true }));
  await vi.waitFor(() => expect(button('Send').disabled).toBe(false));
  place.querySelector('form')?.dispatchEvent(new Event('submit', { bubbles: true, cancelable: true }));
  await vi.waitFor(() => expect(sent).toHaveLength(before + 1));
  await vi.waitFor(() => expect(button('Send')).toBeDefined());
}

test('a question that was not answered is asked again, and leaves no empty answer in the conversation', async () => {
  const sent = playground(refusal(), answer('Yes.'), answer('No.'));
  await ask(sent, 'Is it?');
  expect(place.textContent).toContain('no replica is ready');
  expect(area().value).toBe('Is it?');
  await ask(sent, 'Is it?');
  await ask(sent, 'And that?');
  expect(sent.at(-1)?.messages).toEqual([
    { role: 'user', content: 'Is it?' },
    { role: 'assistant', content: 'Yes.' },
    { role: 'user', content: 'And that?' }
  ]);
});

test('a text that was continued is no part of a conversation', async () => {
  const sent = playground(answer('upon a time'), answer('Hello.'));
  button('Continue a text').click();
  await ask(sent, 'Once');
  expect(sent[0]?.prompt).toBe('Once');
  button('Chat').click();
  await ask(sent, 'Hi');
  expect(sent[1]?.messages).toEqual([{ role: 'user', content: 'Hi' }]);
});

test('an empty field is left to the model', () => {
  expect(samplingOf({ max_tokens: '16', temperature: '', top_p: ' ', seed: '' })).toEqual({ max_tokens: 16 });
});
