// The rules behind the panels, by values.
import { describe, expect, test } from 'vitest';

import manifest from '../package.json';
import { toggled, canDistribute, distributeLine } from '../src/panels/distribute-cell';
import { CELL_SOURCES, cellSource } from '../src/panels/cell-sources';
import { EndedRuns, HangingRuns, isHolder } from '../src/panels/ended-runs';
import { events } from '../src/shared/api/completions';
import type { Rest } from '../src/shared/api/rest';
import type { ClusterOption, Endpoint, Run, World } from '../src/shared/api/types';
import { changedOptions, parseOption } from '../src/shared/components/clusters/options';
import { lossOf, proxiedDashboard } from '../src/shared/components/clusters/loss';
import { opens } from '../src/shared/components/endpoints/keys';
import { snippets } from '../src/shared/components/endpoints/snippets';
import { entriesOf, filterRuns, headline, stateCounts } from '../src/shared/components/runs/filter';
import { VERSION } from '../src/version';

const run = (name: string, changes: Partial<Run> = {}): Run => ({
  run_id: `${name}-1`,
  name,
  state: 'running',
  created: 1,
  ended: null,
  world_size: 2,
  ranks: [0, 1],
  cluster: 'local',
  artifacts: {},
  progress: null,
  metrics: {},
  not_finite: {},
  world_id: '',
  holder: '',
  sweep: '',
  num_restarts: 0,
  cost: null,
  num_resizes: 0,
  hang: null,
  phase: '',
  ...changes
});
const option = (name: string, type: string, changes: Partial<ClusterOption> = {}): ClusterOption => ({
  name,
  type,
  default: null,
  help: '',
  choices: [],
  ...changes
});

test('the version of the front end is that of its package', () => {
  expect(VERSION).toBe(manifest.version);
});

describe('the form of a cluster', () => {
  test('texts become the values that a class takes', () => {
    expect(parseOption(option('cores', 'integer'), '4')).toBe(4);
    expect(parseOption(option('hosts', 'list'), 'a, b')).toEqual(['a', 'b']);
    expect(parseOption(option('env', 'object'), '{"A": 1}')).toEqual({ A: 1 });
    expect(parseOption(option('nanny', 'boolean'), 'false')).toBe(false);
    expect(parseOption(option('queue', 'text'), '  ')).toBeUndefined();
  });
  test('what is no number is refused by name', () => {
    expect(() => parseOption(option('cores', 'integer'), '4.5')).toThrow('cores: "4.5" is no whole number.');
    expect(() => parseOption(option('env', 'object'), '{')).toThrow('env: expected an object');
  });
  test('options that equal their defaults are not sent', () => {
    const options = [option('slots', 'integer', { default: 1 }), option('queue', 'text')];
    expect(changedOptions(options, { slots: '1', queue: 'gpu' })).toEqual({ queue: 'gpu' });
  });
});

describe('what ends with a cluster', () => {
  const worlds = [{ world_id: 'w', cluster: 'a', holder: 'x.ipynb', num_ranks: 2, state: 'idle' }] as World[];
  const endpoints = [{ name: 'poet', cluster: null, state: 'ready' }] as Endpoint[];
  test('runs that go on, worlds, and endpoints that named none when it is the newest', () => {
    const runs = [run('one', { cluster: 'a' }), run('old', { cluster: 'a', state: 'finished' }), run('other')];
    const loss = lossOf({ name: 'a' }, runs, worlds, endpoints, 'a');
    expect([loss.runs.length, loss.worlds.length, loss.endpoints.length]).toEqual([1, 1, 1]);
    expect(lossOf({ name: 'b' }, runs, worlds, endpoints, 'a')).toEqual({ runs: [], worlds: [], endpoints: [] });
  });
  test('a dashboard on the host of the server is reached by its port, another by its host', () => {
    expect(proxiedDashboard('http://hub/user/a%20b/', 'http://127.0.0.1:41/status')).toBe('http://hub/user/a%20b/proxy/41/status');
    expect(proxiedDashboard('http://hub/', 'http://node7:41/status')).toBe('http://hub/proxy/node7:41/status');
    expect(proxiedDashboard('http://hub/', '')).toBeNull();
  });
  test('a dashboard is a page of a host, and no script', () => {
    expect(proxiedDashboard('http://hub/', 'javascript:alert(1)//:1')).toBeNull();
    expect(proxiedDashboard('http://hub/', 'data:text/html,x')).toBeNull();
  });
  test('an endpoint ends with the cluster that its replicas are on, whichever is the newest now', () => {
    const placed = [{ name: 'poet', cluster: null, state: 'ready', replicas: [{ cluster: 'a' }] }] as Endpoint[];
    expect(lossOf({ name: 'a' }, [], [], placed, 'b').endpoints).toHaveLength(1);
    expect(lossOf({ name: 'b' }, [], [], placed, 'b').endpoints).toHaveLength(0);
  });
});

describe('the list of runs', () => {
  const runs = [run('old'), run('new', { created: 5, state: 'failed' }), run('poet', { created: 3, holder: 'me/a.ipynb' })];
  test('newest first, by state and by words', () => {
    expect(filterRuns(runs, '', 'all').map(one => one.name)).toEqual(['new', 'poet', 'old']);
    expect(filterRuns(runs, '', 'failed').map(one => one.name)).toEqual(['new']);
    expect(filterRuns(runs, 'A.ipynb po', 'active').map(one => one.name)).toEqual(['poet']);
  });
  test('the loss comes first, and a value that is not finite is said', () => {
    expect(headline({ lr: 1, loss: 2.345678 })).toBe('loss 2.346');
    expect(headline({ loss: null })).toBe('loss not finite');
    expect(headline({})).toBe('');
  });
  test('a run that was alive and is not has ended; one never seen alive has not', () => {
    const ended = new EndedRuns();
    expect(ended.look([run('a'), run('b', { state: 'failed' })])).toEqual([]);
    expect(ended.look([run('a', { state: 'finished' })]).map(one => one.name)).toEqual(['a']);
    expect(ended.look([run('a', { state: 'finished' })])).toEqual([]);
  });
  test('a trial of a sweep ends without a word: there are many of them', () => {
    const ended = new EndedRuns();
    expect(ended.look([run('tuned-0001', { sweep: 'tuned' }), run('sweeper', { holder: 'a.ipynb' })])).toEqual([]);
    const later = [run('tuned-0001', { sweep: 'tuned', state: 'failed' }), run('sweeper', { state: 'finished' })];
    expect(ended.look(later).map(one => one.name)).toEqual(['sweeper']);
  });
  test('a sweep is one entry with its trials, where the newest of them is', () => {
    const trial = (number: number, changes: Partial<Run> = {}) => run(`tuned-${number}`, { sweep: 'tuned', ...changes });
    const runs = [run('new'), trial(2), run('between'), trial(1, { state: 'finished' }), trial(0, { state: 'finished' })];
    const entries = entriesOf(runs);
    expect(entries.map(entry => ('run' in entry ? entry.run.name : entry.trials.map(one => one.name)))).toEqual([
      'new',
      ['tuned-2', 'tuned-1', 'tuned-0'],
      'between'
    ]);
    expect(stateCounts(runs.slice(1))).toBe('2 running, 2 finished');
  });
  test('a run that hangs is told once, and again when it hangs again', () => {
    const hangs = { hang: { t: 1, text: 'rank 1 is late', late: [1], waiting: [0] } };
    const hanging = new HangingRuns();
    expect(hanging.look([run('a'), run('b', hangs)]).map(one => one.name)).toEqual(['b']);
    expect(hanging.look([run('b', hangs)])).toEqual([]);
    expect(hanging.look([run('b')])).toEqual([]);
    expect(hanging.look([run('b', hangs)]).map(one => one.name)).toEqual(['b']);
    expect(hanging.look([run('c', { ...hangs, state: 'failed' })])).toEqual([]);
  });
  test('a notebook is known by the end of its path', () => {
    expect(isHolder('notebooks/a.ipynb', 'a.ipynb')).toBe(true);
    expect(isHolder('project/a.ipynb', 'deep/project/a.ipynb')).toBe(true);
    expect(isHolder('project/a.ipynb', 'other/a.ipynb')).toBe(false);
    expect(isHolder('process 7', 'a.ipynb')).toBe(false);
  });
});

describe('cells', () => {
  test('a cell is distributed and comes back as it was, with its options the next time', () => {
    const source = 'x = 1\nprint(x)';
    const distributed = toggled(source, '%%distribute --nproc 4');
    expect(distributed).toBe('%%distribute --nproc 4\nx = 1\nprint(x)');
    expect(toggled(distributed)).toBe(source);
    expect(distributeLine(distributed)).toBe('%%distribute --nproc 4');
  });
  test('a cell of another magic cannot be distributed', () => {
    expect(canDistribute('%%bash\nls')).toBe(false);
    expect(canDistribute('%time x')).toBe(true);
  });
  test('a run is resumed with its own text', () => {
    expect(CELL_SOURCES.resume('poet', '%%distribute -n 2\nx = 1')).toBe('%%distribute --resume poet\nx = 1');
  });
  test('a cell is about the run of its tab, not the newest of its name', async () => {
    const found = async (run: string) => ({ run_id: run === 'poet' ? 'poet-new' : run, source: 'x = 1' }); // as the server finds it
    const rest = { run: found } as unknown as Rest;
    const source = (cell: string, id: string) => cellSource({ rest }, { cell, id, name: 'poet' });
    expect(await source('attach', 'poet-old')).toContain('%runs attach poet-old');
    expect(await source('resume', 'poet-old')).toBe('%%distribute --resume poet-old\nx = 1');
    expect(await source('resume', 'poet-new')).toBe('%%distribute --resume poet\nx = 1');
  });
  test('an endpoint is asked for what it is there for', async () => {
    const connection = { baseUrl: 'http://h/' };
    const source = async (kind: string) => {
      const rest = { connection, get: async () => ({ kind, inputs: '' }) } as unknown as Rest;
      return cellSource({ rest }, { cell: 'client', id: 'poet', name: 'poet' });
    };
    expect(await source('generator')).toContain('client.chat.completions.create(');
    expect(await source('classifier')).toContain('http://h/llmcloud/v2/models/poet/infer');
    expect(await source('embedder')).toContain('client.embeddings.create(model="poet", input="Hello")');
  });
});

describe('endpoints', () => {
  test('a key opens what its scopes name', () => {
    expect(opens({ scopes: ['infer:po*'] }, 'poet')).toBe(true);
    expect(opens({ scopes: ['models:read', 'infer:poet'] }, 'poets')).toBe(false);
  });
  test('a name with quotes stays a text in every snippet', () => {
    for (const { text } of snippets('http://x/v1', 'a"b')) {
      expect(text).toContain('a\\"b');
    }
  });
  test('a module is asked with what it has told, else with a word for it', () => {
    expect(snippets('http://x/v1', 'net', 'python', '[[0.0, 0.0]]')[0].text).toContain('{"inputs": [[0.0, 0.0]]}');
    expect(snippets('http://x/v1', 'net', 'module')[0].text).toContain('{"inputs": "NUMBERS IN LISTS"}');
    expect(snippets('http://x/v1', 'net', 'classifier')[0].text).toContain('{"inputs": ["Hello"]}');
  });
  test('events are read however they are cut', async () => {
    const chunks = ['data: {"a"', ':1}\r\n\r', '\ndata: [DONE]\n\n'];
    const body = new ReadableStream<Uint8Array>({
      start(controller) {
        chunks.forEach(chunk => controller.enqueue(new TextEncoder().encode(chunk)));
        controller.close();
      }
    });
    const found = [];
    for await (const data of events(body)) {
      found.push(data);
    }
    expect(found).toEqual(['{"a":1}', '[DONE]']);
  });
});
