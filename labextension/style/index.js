import 'uplot/dist/uPlot.min.css';
import '../src/shared/style/index.css';
import './index.css';
