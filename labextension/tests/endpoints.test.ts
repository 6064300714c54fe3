// What the forms of an endpoint ask for, by values.
import { describe, expect, test } from 'vitest';

import type { Endpoint, ServedRevision } from '../src/shared/api/types';
import { snippets } from '../src/shared/components/endpoints/snippets';
import { comparisonText, limitsOf, replicasOf, rollbackTo, sharesOf } from '../src/shared/components/endpoints/wanted';

const revision = (number: number, role: string, changes: Partial<ServedRevision> = {}): ServedRevision => ({
  number,
  role,
  weight: 0,
  target: `run-${number}`,
  fingerprint: '',
  num_replicas: 1,
  step: null,
  note: '',
  was_stable: true,
  num_requests: 0,
  num_errors: 0,
  comparison: null,
  ...changes
});
const endpoint = (...revisions: ServedRevision[]) => ({ name: 'poet', revisions }) as unknown as Endpoint;

describe('replicas', () => {
  test('a number, or bounds that the load decides within', () => {
    expect(replicasOf('3', 'x', false)).toBe('3');
    expect(replicasOf('0', '4', true)).toBe('0:4');
  });
  test('what cannot be is said before it is sent', () => {
    expect(() => replicasOf('0', '', false)).toThrow('replicas: "0" is no whole number from 1 on.');
    expect(() => replicasOf('3', '2', true)).toThrow('At most 2 replicas are fewer than at least 3.');
    expect(() => replicasOf('1', '', true)).toThrow('most replicas');
  });
});

test('the shares of both make a hundred', () => {
  expect(sharesOf(5)).toEqual({ stable: 95, canary: 5 });
  expect(() => sharesOf(101)).toThrow('101 percent');
});

test('a key gets the limits that were filled in, and no others', () => {
  expect(limitsOf({ requests_per_minute: '60', tokens_per_minute: ' ' })).toEqual({ requests_per_minute: 60 });
  expect(() => limitsOf({ parallel_requests: '0' })).toThrow('parallel requests: "0" is no whole number from 1 on.');
});

describe('the way back', () => {
  test('without the canary, else to the newest revision before that has not failed', () => {
    expect(rollbackTo(endpoint(revision(1, 'stable'), revision(2, 'canary')))).toBe('run-1');
    expect(rollbackTo(endpoint(revision(1, 'retired'), revision(2, 'retired', { note: 'bad' }), revision(3, 'stable')))).toBe('run-1');
    expect(rollbackTo(endpoint(revision(1, 'stable')))).toBe('');
  });
  test('not to what was only tried', () => {
    const tried = revision(2, 'retired', { was_stable: false });
    expect(rollbackTo(endpoint(revision(1, 'previous', { was_stable: true }), tried, revision(3, 'stable')))).toBe('run-1');
    expect(rollbackTo(endpoint(revision(1, 'retired', { was_stable: null }), revision(3, 'stable')))).toBe('run-1');
  });
});

test('what generates no text is asked by the Open Inference Protocol', () => {
  const [curl, python] = snippets('http://h/llmcloud/v1', 'poet', 'classifier');
  expect(curl?.text).toContain("'http://h/llmcloud/v2/models/poet/infer'");
  expect(python?.text).toContain('json={"inputs": ["Hello"]}');
  expect(snippets('http://h/llmcloud/v1', 'poet')).toHaveLength(3);
});

test('a shadow is compared in a line', () => {
  expect(comparisonText(revision(2, 'shadow'))).toBe('nothing compared yet');
  const comparison = {
    num_compared: 4,
    num_comparable: 2,
    equal_share: 0.5,
    latency_ratio: 2,
    error_share: 0.25,
    stable_error_share: 0,
    num_dropped: 0
  };
  expect(comparisonText(revision(2, 'shadow', { comparison }))).toBe(
    '50% of 2 greedy answers equal, 2.00 x the time, 25% errors (0% without it)'
  );
  const none = { ...comparison, num_compared: 0, num_dropped: 3 };
  expect(comparisonText(revision(2, 'shadow', { comparison: none }))).toBe('nothing compared yet, 3 not copied');
});
