// The events over plain requests, with a server that a test plays.
import { afterEach, beforeEach, expect, test, vi } from 'vitest';

import { makeConnection } from '../src/shared/api/connection';
import { PollingSocket } from '../src/shared/api/polling';

const connection = makeConnection('http://host/base/', 'secret');

interface Asked {
  query: URLSearchParams;
  answer(number: number, messages: unknown[]): void;
  fail(status?: number): void;
}

let asked: Asked[] = [];
const play = ((url: string, init: RequestInit) =>
  new Promise<Response>((resolve, reject) => {
    init.signal?.addEventListener('abort', () => reject(new DOMException('', 'AbortError')));
    asked.push({
      query: new URL(url).searchParams,
      answer: (number, messages) => resolve(new Response(JSON.stringify({ session: 's', number, messages }))),
      fail: status => (status ? resolve(new Response('{}', { status })) : reject(new TypeError('no network')))
    });
  })) as unknown as typeof fetch;
const last = () => asked[asked.length - 1] as Asked;
const said = () => JSON.parse(last().query.get('messages') ?? '[]') as { type: string }[];

let heard: string[] = [];
let isClosed = false;
function open(): PollingSocket {
  const socket = new PollingSocket(connection, play);
  socket.onmessage = event => heard.push((JSON.parse(String(event.data)) as { type: string }).type);
  socket.onclose = () => (isClosed = true);
  return socket;
}

beforeEach(() => {
  vi.useFakeTimers();
  asked = [];
  heard = [];
  isClosed = false;
});
afterEach(() => {
  vi.useRealTimers();
});

test('what is asked for is said at once, acknowledgements with the next request', async () => {
  const socket = open();
  expect([last().query.get('session'), last().query.get('received')]).toEqual(['', '0']);
  last().answer(1, [{ type: 'hello' }]);
  await vi.advanceTimersByTimeAsync(300);
  expect(heard).toEqual(['hello']);
  expect([last().query.get('session'), last().query.get('received')]).toEqual(['s', '1']);
  socket.send('{"type":"ack","cursor":1}');
  expect(asked).toHaveLength(2); // it waits for the answer
  socket.send('{"type":"subscribe"}');
  await vi.advanceTimersByTimeAsync(0);
  expect(asked).toHaveLength(3);
  expect(said().map(message => message.type)).toEqual(['ack', 'subscribe']);
  last().answer(2, [{ type: 'snapshot' }]);
  await vi.advanceTimersByTimeAsync(300);
  expect([heard, said()]).toEqual([['hello', 'snapshot'], []]);
});

test('an answer that is lost is asked for again, with what was said', async () => {
  const socket = open();
  last().answer(1, [{ type: 'hello' }]);
  await vi.advanceTimersByTimeAsync(0);
  socket.send('{"type":"subscribe"}');
  await vi.advanceTimersByTimeAsync(0);
  last().fail();
  await vi.advanceTimersByTimeAsync(1000);
  expect([last().query.get('received'), said().length]).toEqual(['1', 1]);
  last().answer(1, []);
  await vi.advanceTimersByTimeAsync(300);
  expect([heard, said()]).toEqual([['hello'], []]);
});

test('a session that has ended, or a server that does not answer again and again, ends it', async () => {
  open();
  last().answer(1, [{ type: 'hello' }]);
  await vi.advanceTimersByTimeAsync(300);
  last().fail(404);
  await vi.advanceTimersByTimeAsync(0);
  expect(isClosed).toBe(true);
  isClosed = false;
  open();
  last().answer(1, [{ type: 'hello' }]);
  await vi.advanceTimersByTimeAsync(300);
  for (let at = 0; at < 3; at += 1) {
    expect(isClosed).toBe(false);
    last().fail(at === 0 ? 502 : undefined);
    await vi.advanceTimersByTimeAsync(1000);
  }
  expect(isClosed).toBe(true);
});

test('once closed nothing is asked or told any more', async () => {
  const socket = open();
  last().answer(1, [{ type: 'hello' }]);
  await vi.advanceTimersByTimeAsync(300);
  socket.close();
  await vi.advanceTimersByTimeAsync(60_000);
  expect([asked.length, isClosed]).toEqual([2, false]);
});
