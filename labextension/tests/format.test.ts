import { expect, test } from 'vitest';

import { formatBytes, formatCount, formatDuration, formatLatency, formatNumber, formatRate, splitName } from '../src/shared/format';

test('numbers have four digits that count, and tell what is not finite', () => {
  expect([0.00025, -0.00125, 1_250_000, 2.3412345, 3.1e-5, 1.5e9].map(value => formatNumber(value))).toEqual([
    '0.00025',
    '-0.00125',
    '1,250,000',
    '2.341',
    '3.1e-5',
    '1.5e9'
  ]);
  expect(formatNumber(null)).toBe('not finite');
  expect(formatNumber(1e300)).toBe('1e300');
});

test('steps have all of their digits, by which they are looked for', () => {
  expect([7, 12_345_678, 1.5, 12_345_678.5, 1e300, null].map(formatCount)).toEqual([
    '7', '12,345,678', '1.5', '12,345,679', '1e300', 'not finite'
  ]);
});

test('durations have two units at most', () => {
  expect([4.2, 47, 185, 7512, 90000].map(formatDuration)).toEqual(['4.2 s', '47 s', '3 min 5 s', '2 h 5 min', '1 d 1 h']);
});

test('bytes are told in powers of a thousand', () => {
  expect([512, 1_500_000_000, null].map(formatBytes)).toEqual(['512 B', '1.5 GB', '']);
});

test('a long name keeps its end', () => {
  expect(splitName('loss')).toEqual(['loss', '']);
  expect(splitName('a/rather/long/name/of/validation_accuracy')[1]).toBe('n_accuracy');
});

test('what is rare is told by the minute', () => {
  expect([0, 1 / 60, 0.4, 1, 59.123].map(formatRate)).toEqual(['0/s', '1/min', '24/min', '1/s', '59.1/s']);
});

test('the time to an answer is told in milliseconds below a second', () => {
  expect([0, 0.0004, 0.0243, 0.9994, 0.9996, 1.24, 75].map(formatLatency)).toEqual([
    '< 1 ms', '< 1 ms', '24 ms', '999 ms', '1.0 s', '1.2 s', '1 min 15 s'
  ]);
});
