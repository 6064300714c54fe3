import { afterEach, beforeEach, expect, test, vi } from 'vitest';

import { makeConnection } from '../src/shared/api/connection';
import { Events } from '../src/shared/api/events';
import { hearTime, serverNow } from '../src/shared/clock';
import { linesOf } from '../src/shared/components/run/output';
import type { Run, SeriesTail } from '../src/shared/api/types';
import { TopicStore } from '../src/shared/stores/topic-store';
import { WatchedRun, withTails } from '../src/shared/stores/watched-run';
import { type FakeSocket, fakeSurroundings, setVisible } from './fake-socket';

const connection = makeConnection('http://host/base%20url/', 'secret');
let fake = fakeSurroundings();
let events = new Events(connection, fake.around);
const socket = (at = fake.sockets.length - 1) => fake.sockets[at] as FakeSocket;

beforeEach(() => {
  vi.useFakeTimers();
  setVisible(true);
  fake = fakeSurroundings();
  events = new Events(connection, fake.around);
});
afterEach(() => {
  vi.useRealTimers();
  vi.restoreAllMocks();
});

const run = (run_id: string, created: number, state = 'running') => ({ run_id, name: run_id, created, state }) as Run;
const names = (store: TopicStore<'runs'>) => store.value.items.map(item => item.run_id);

const tail = (from: number, steps: number[], name = 'loss'): SeriesTail => ({
  name,
  from,
  step: steps,
  time: steps,
  epoch: steps.map(() => null),
  mean: steps,
  low: steps,
  high: steps,
  n: steps.map(() => 2),
  not_finite: steps.map(() => 0),
  is_partial: false,
  ranks: [0, 1],
  unit: ''
});

test('nothing is asked until somebody follows, and one socket serves all topics', () => {
  const runs = new TopicStore(events, 'runs');
  expect(fake.sockets).toHaveLength(0);
  runs.follow(() => undefined);
  new TopicStore(events, 'clusters').follow(() => undefined);
  expect(fake.sockets).toHaveLength(1);
  expect(socket().url).toBe('ws://host/base%20url/llmcloud/api/events?token=secret');
  socket().hello();
  expect(socket().sent).toEqual([
    { type: 'subscribe', topics: ['runs'], epoch: '', cursor: 0 },
    { type: 'subscribe', topics: ['clusters'], epoch: '', cursor: 0 }
  ]);
});

test('a snapshot replaces what was known, changes and removals follow, the newest run is first', () => {
  const runs = new TopicStore(events, 'runs');
  runs.follow(() => undefined);
  socket().hello();
  socket().say({ type: 'snapshot', topic: 'runs', cursor: 1, items: [run('old', 1), run('new', 2)] });
  expect([names(runs), runs.value.isLoaded]).toEqual([['new', 'old'], true]);
  socket().say({ type: 'changed', topic: 'runs', cursor: 2, item: run('newest', 3) });
  socket().say({ type: 'removed', topic: 'runs', cursor: 3, id: 'old' });
  expect(names(runs)).toEqual(['newest', 'new']);
  socket().say({ type: 'snapshot', topic: 'runs', cursor: 4, items: [run('other', 1)] });
  expect(names(runs)).toEqual(['other']);
});

test('a source that cannot be read leaves what was known, marked as old, until it is read again', () => {
  const runs = new TopicStore(events, 'runs');
  runs.follow(() => undefined);
  socket().hello();
  socket().say({ type: 'snapshot', topic: 'runs', cursor: 1, items: [run('one', 1)] });
  socket().say({ type: 'problem', topic: 'runs', message: 'The folder of runs cannot be read.' });
  expect(runs.value).toMatchObject({ isStale: true, problem: 'The folder of runs cannot be read.' });
  expect(names(runs)).toEqual(['one']);
  socket().say({ type: 'synced', topic: 'runs', cursor: 1 });
  expect(runs.value).toMatchObject({ isStale: false, problem: '' });
});

test('after a cut the topics go on from their cursors, in the same life of the server', () => {
  const runs = new TopicStore(events, 'runs');
  runs.follow(() => undefined);
  socket().hello('one');
  socket().say({ type: 'snapshot', topic: 'runs', cursor: 7, items: [run('one', 1)] });
  socket().close();
  expect(runs.value).toMatchObject({ isStale: true });
  expect(runs.value.problem).toContain('cut');
  vi.advanceTimersByTime(1000);
  expect(fake.sockets).toHaveLength(2);
  socket().hello('one');
  expect(socket().sent).toEqual([{ type: 'subscribe', topics: ['runs'], epoch: 'one', cursor: 7 }]);
  socket().close();
  vi.advanceTimersByTime(1000);
  socket().hello('two'); // the server was started again: its cursors are others
  expect(socket().sent).toEqual([{ type: 'subscribe', topics: ['runs'], epoch: '', cursor: 0 }]);
});

test('each failure to connect is followed by a longer wait', () => {
  new TopicStore(events, 'runs').follow(() => undefined);
  vi.spyOn(Math, 'random').mockReturnValue(0.5);
  let numSockets = 1;
  for (const wait of [500, 1000, 2000, 4000]) {
    socket().close();
    if (fake.polls.length && !fake.polls.at(-1)?.isClosed) fake.polls.at(-1)?.close(); // the server is not there at all
    vi.advanceTimersByTime(wait - 1);
    expect(fake.sockets).toHaveLength(numSockets);
    vi.advanceTimersByTime(1);
    expect(fake.sockets).toHaveLength((numSockets += 1));
  }
});

test('where websockets do not come through the messages are fetched, and the websocket is tried again later', () => {
  const runs = new TopicStore(events, 'runs');
  runs.follow(() => undefined);
  socket().close(); // refused by a proxy
  vi.advanceTimersByTime(1000);
  expect(fake.polls).toHaveLength(0);
  vi.advanceTimersByTime(10_000); // the second one opens, and nothing comes
  expect(fake.polls).toHaveLength(1);
  const poll = fake.polls[0] as FakeSocket;
  poll.hello('one');
  expect(poll.sent).toEqual([{ type: 'subscribe', topics: ['runs'], epoch: '', cursor: 0 }]);
  poll.say({ type: 'snapshot', topic: 'runs', cursor: 7, items: [run('one', 1)] });
  expect([names(runs), runs.value.problem]).toEqual([['one'], '']);
  for (let at = 0; at < 15; at += 1) {
    vi.advanceTimersByTime(20_000);
    poll.say({ type: 'alive' });
  }
  expect(poll.isClosed).toBe(true);
  expect(fake.sockets).toHaveLength(3);
  socket().close(); // it is refused still: no more than that is lost
  expect(runs.value.problem).toBe('');
  (fake.polls[1] as FakeSocket).hello('one');
  expect(fake.polls[1]?.sent).toEqual([{ type: 'subscribe', topics: ['runs'], epoch: 'one', cursor: 7 }]);
});

test('a websocket on which not even the heartbeat comes is opened again', () => {
  new TopicStore(events, 'runs').follow(() => undefined);
  socket().hello();
  vi.advanceTimersByTime(50_000);
  socket().say({ type: 'alive' });
  vi.advanceTimersByTime(50_000);
  expect(fake.sockets).toHaveLength(1);
  vi.advanceTimersByTime(11_000);
  expect(socket(0).isClosed).toBe(true);
  expect(fake.sockets).toHaveLength(2);
  expect(fake.polls).toHaveLength(0);
});

test('a hidden page rests, and goes on when it is seen again', () => {
  new TopicStore(events, 'runs').follow(() => undefined);
  socket().hello();
  setVisible(false);
  vi.advanceTimersByTime(10_000);
  expect(socket().isClosed).toBe(true);
  vi.advanceTimersByTime(600_000);
  expect(fake.sockets).toHaveLength(1);
  setVisible(true);
  expect(fake.sockets).toHaveLength(2);
});

test('the last who leaves ends the subscription, and the socket a little later', () => {
  const runs = new TopicStore(events, 'runs');
  const leave = [runs.follow(() => undefined), runs.follow(() => undefined)];
  socket().hello();
  leave[0]?.();
  expect(socket().sent).toHaveLength(1);
  leave[1]?.();
  expect(socket().sent[1]).toEqual({ type: 'unsubscribe', topics: ['runs'] });
  vi.advanceTimersByTime(10_000);
  expect(socket().isClosed).toBe(true);
});

test('a tail replaces the columns from its index on', () => {
  const first = withTails(new Map(), [tail(0, [1, 2, 3])]);
  const second = withTails(first, [tail(2, [4, 5]), tail(0, [9], 'other')]);
  expect(second.get('loss')?.step).toEqual([1, 2, 4, 5]);
  expect(second.get('other')?.mean).toEqual([9]);
  expect(withTails(second, [tail(0, [7])]).get('loss')?.step).toEqual([7]);
  expect(first.get('loss')?.step).toEqual([1, 2, 3]);
});

test('a watched run is acknowledged once it is drawn, watched again after a cut, its output told once', () => {
  const watched = new WatchedRun(events, 'r-1');
  watched.follow(() => undefined);
  socket().hello();
  expect(socket().sent).toEqual([{ type: 'watch', run_id: 'r-1', points: 800 }]);
  const record = (seq: number) => ({ rank: 0, seq, t: seq, kind: 'stdout', text: `${seq}\n`, stream: 'stdout', html: '', image: '', is_warning: false });
  socket().say(
    { type: 'run_series', run_id: 'r-1', cursor: 1, series: [tail(0, [1, 2])] },
    { type: 'run_output', run_id: 'r-1', cursor: 2, records: [record(1), record(2)], skipped: 0 }
  );
  expect(socket().sent).toHaveLength(1);
  fake.drawFrame();
  expect(socket().sent[1]).toEqual({ type: 'ack', cursor: 2 });
  socket().close();
  expect(watched.value.problem).toContain('The run goes on');
  vi.advanceTimersByTime(1000);
  socket().hello();
  expect(socket().sent).toEqual([{ type: 'watch', run_id: 'r-1', points: 800 }]);
  socket().say(
    { type: 'run_series', run_id: 'r-1', cursor: 1, series: [tail(0, [1, 2, 3])] },
    { type: 'run_output', run_id: 'r-1', cursor: 1, records: [record(1), record(2), record(3)], skipped: 0 }
  );
  expect(watched.value.output.map(one => one.seq)).toEqual([1, 2, 3]);
  expect(watched.value.series.get('loss')?.step).toEqual([1, 2, 3]);
  expect(watched.value.problem).toBe('');
});

const written = (seq: number, rank = 0) => ({
  rank, seq, t: seq, kind: 'stdout', text: `${seq}\n`, stream: 'stdout', html: '', image: '', is_warning: false
});

test('output that was let go while the page was away is said where it is missing', () => {
  const watched = new WatchedRun(events, 'r-1');
  watched.follow(() => undefined);
  socket().hello();
  const say = (seqs: number[], skipped: number, rank = 0) =>
    socket().say({ type: 'run_output', run_id: 'r-1', cursor: 1, records: seqs.map(seq => written(seq, rank)), skipped });
  const shown = () => linesOf(watched.value.output, null).map(line => line.text);
  say([1, 2], 0);
  socket().close();
  vi.advanceTimersByTime(1000);
  socket().hello();
  say([90, 91], 89);
  expect(shown()).toEqual(['1', '2', '… 87 pieces of output are not shown here; the log has them …', '90', '91']);
  say([92], 0);
  say([95], 2); // too slow: the server has let go of two
  expect(shown().slice(-3)).toEqual(['92', '… 2 pieces of output are not shown here; the log has them …', '95']);
  say([1, 2], 0, 1);
  expect(shown().slice(-3)).toEqual(['95', '1', '2']);
});

test('what is missing at the start is told once, above the output', () => {
  const watched = new WatchedRun(events, 'r-1');
  watched.follow(() => undefined);
  socket().hello();
  socket().say({ type: 'run_output', run_id: 'r-1', cursor: 1, records: [written(40)], skipped: 50 });
  socket().say({ type: 'run_output', run_id: 'r-1', cursor: 2, records: [written(12, 1)], skipped: 0 });
  expect([watched.value.skipped, watched.value.output.map(one => one.kind)]).toEqual([50, ['stdout', 'stdout']]);
});

test('a run that the server has no room for says so, and is watched once there is', () => {
  const [one, other] = [new WatchedRun(events, 'r-1'), new WatchedRun(events, 'r-2')];
  const leave = one.follow(() => undefined);
  other.follow(() => undefined);
  socket().hello();
  vi.spyOn(console, 'warn').mockReturnValue();
  socket().say({ type: 'refused', message: '1 runs are watched already', run_id: 'r-2' });
  expect([one.value.problem, other.value.problem]).toEqual(['', expect.stringContaining('So many runs')]);
  leave();
  expect(socket().sent.slice(-2)).toEqual([{ type: 'unwatch', run_id: 'r-1' }, { type: 'watch', run_id: 'r-2', points: 800 }]);
});

test('ages are counted by the clock of the server', () => {
  new TopicStore(events, 'runs').follow(() => undefined);
  socket().say({ type: 'hello', epoch: 'one', version: '0.1.0', heartbeat_s: 20, now: Date.now() / 1000 - 300 });
  expect(serverNow()).toBeCloseTo(Date.now() / 1000 - 300);
  hearTime(Date.now() / 1000);
});

test('a run that is no more is said to be gone', () => {
  const watched = new WatchedRun(events, 'r-1');
  watched.follow(() => undefined);
  socket().hello();
  socket().say({ type: 'run_gone', run_id: 'r-1' });
  expect(watched.value.isGone).toBe(true);
});
